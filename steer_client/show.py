"""What the `steer` command prints."""

import json
import shutil
import sys
from collections.abc import AsyncIterator, Iterable, Sequence

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from steer.v1 import (
    activations_pb2,
    admin_pb2,
    dictionaries_pb2,
    edits_pb2,
    info_pb2,
    steering_pb2,
)

from steer_client import tables
from steer_client.client import GenerationEvent
from steer_client.rows import rows


class Json:
    """One JSON object per line, with the proto's field names."""

    def dictionaries(self, entries: Iterable[dictionaries_pb2.Dictionary]) -> None:
        for entry in entries:
            self._print("", entry)

    def feature(self, feature: dictionaries_pb2.Feature) -> None:
        self._print("", feature)

    def encoded(self, response: activations_pb2.EncodeResponse) -> None:
        self._print("", response)

    def found(self, message: Message) -> None:
        """Anything that is one message."""
        self._print("", message)

    def event(self, event: GenerationEvent) -> None:
        self._print(type(event).__name__.lower(), event)

    async def compared(
        self, _: Sequence[str], responses: AsyncIterator[steering_pb2.CompareResponse]
    ) -> None:
        async for response in responses:
            self._print("", response)

    def scored(
        self,
        plain: steering_pb2.ScoreResponse,
        edited: steering_pb2.ScoreResponse | None,
        _: bool,
    ) -> None:
        self._print("plain", plain)
        if edited:
            self._print("edited", edited)

    def patched(
        self, _: Sequence[str], __: Sequence[str], found: steering_pb2.PatchResponse
    ) -> None:
        self._print("", found)

    def _print(self, name: str, message: Message) -> None:
        content = MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps({name: content} if name else content, ensure_ascii=False), flush=True)


class Plain:
    """Lines for people: results on stdout, what is said about them on stderr."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._edits: Sequence[str] = ()

    def dictionaries(self, entries: Sequence[dictionaries_pb2.Dictionary]) -> None:
        for entry in entries:
            print(
                f"{entry.name}  {entry.site}  {entry.n_features} features of {entry.d_model}  "
                f"{entry.architecture}  {entry.labelled_features} labelled  {entry.model_id}  "
                f"sha256 {entry.sha256[:12]}"
            )
            if entry.HasField("quality"):
                quality = entry.quality
                print(
                    f"  L0 {quality.l0:.3g}, FVU {quality.fvu:.3g} (PCA {quality.pca_fvu:.3g}), "
                    f"delta CE {quality.delta_ce:.3g} nats, {quality.dead_share:.1%} dead, "
                    f"on {quality.tokens} tokens"
                )
        if not entries:
            print("no dictionary is resident", file=sys.stderr)

    def feature(self, feature: dictionaries_pb2.Feature) -> None:
        print(f"{feature.dictionary}:{feature.index}  {feature.label or '(no label)'}")
        print(
            f"  active on {feature.density:.3%} of tokens, mean {feature.mean_activation:.4g}, "
            f"max {feature.max_activation:.4g}"
        )
        for title, effects in (("raises", feature.logits_up), ("lowers", feature.logits_down)):
            if effects:
                shown = "  ".join(f"{entry.token!r} {entry.effect:+.3g}" for entry in effects)
                print(f"  {title}: {shown}")
        for example in feature.examples:
            strongest = max(example.activations, default=0.0)
            marked = (
                f"[{token}]" if value and value == strongest else token
                for token, value in zip(example.tokens, example.activations, strict=True)
            )
            print(f"  {strongest:8.4g}  {''.join(marked)!r}")

    def found(self, message: Message) -> None:
        """Anything that is one message."""
        match message:
            case dictionaries_pb2.Dictionary():
                self.dictionaries([message])
            case dictionaries_pb2.FeatureMatch():
                name = f"{message.dictionary}:{message.index}"
                print(f"{message.score:6.3f}  {name}  {message.label or '(no label)'}")
            case activations_pb2.InspectResponse():
                self._inspected(message)
            case activations_pb2.ContrastResponse():
                self._contrasted(message)
            case info_pb2.GetServerInfoResponse():
                self._info(message)
            case admin_pb2.SessionInfo():
                state = "generating" if message.generating else "between turns"
                print(
                    f"{message.session_id}  {message.principal or '(anyone)'}  {state}, "
                    f"{message.turns} turns, open {message.age_seconds:.0f} s, "
                    f"idle {message.idle_seconds:.0f} s"
                )
            case admin_pb2.DrainResponse():
                print(
                    f"draining: {message.running_calls} calls run, for {message.drain_seconds} s at most"
                )

    def _inspected(self, response: activations_pb2.InspectResponse) -> None:
        print("   feature      mean       max  frequency  label")
        for entry in response.features:
            print(
                f"{entry.feature:10d}  {entry.mean:8.4g}  {entry.max:8.4g}  {entry.frequency:9.1%}  "
                f"{entry.label or '(no label)'}"
            )
        print(f"{response.tokens} tokens", file=sys.stderr)

    def _contrasted(self, response: activations_pb2.ContrastResponse) -> None:
        print("   feature  difference  positive  negative  label")
        for entry in (*response.positive, *response.negative):
            print(
                f"{entry.feature:10d}  {entry.difference:+10.4g}  {entry.positive:8.4g}  "
                f"{entry.negative:8.4g}  {entry.label or '(no label)'}"
            )
        print(
            f"{response.positive_tokens} positive tokens, {response.negative_tokens} negative ones",
            file=sys.stderr,
        )

    def _info(self, info: info_pb2.GetServerInfoResponse) -> None:
        tested = "passed" if info.self_test_passed else "not run"
        print(
            f"steer {info.version}, vLLM {info.vllm_version}, up {info.uptime_seconds:.0f} s, "
            f"self-test {tested}"
        )
        limits = info.limits
        print(
            f"{info.model}: d_model {info.d_model}, {info.vocab_size} tokens, context "
            f"{limits.max_model_len}, {limits.max_num_seqs} requests at once"
        )
        for site in info.sites:
            print(f"  {site.site}: {site.slots_used} of {site.slots} edit slots in use")
        self.dictionaries(info.dictionaries)
        print(
            f"a request may have {limits.edits} edits ({', '.join(info.edit_kinds)}) and "
            f"{limits.read_outs} read-outs"
        )

    def encoded(self, response: activations_pb2.EncodeResponse) -> None:
        self._pieces += response.tokens.pieces
        for activations in response.activations:
            self._rows(activations)

    def event(self, event: GenerationEvent) -> None:
        match event:
            case steering_pb2.Started():
                self._pieces += event.prompt.pieces
                self._edits = [f"{edit.dictionary}:{edit.feature}" for edit in event.edits]
            case steering_pb2.Tokens():
                print(event.text, end="", flush=True)
                for activations in event.activations:
                    self._rows(activations, sys.stderr)
                # The text of a message with several tokens cannot be told apart.
                one = len(event.ids) == 1
                self._pieces += [event.text] if one else ["(generated)"] * len(event.ids)
            case _:
                self._finished(event)

    def _finished(self, event: steering_pb2.Finished) -> None:
        print(flush=True)
        usage = event.usage
        reason = steering_pb2.FinishReason.Name(event.reason).removeprefix("FINISH_REASON_")
        print(
            f"{reason.lower()}: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
            f"{usage.generated_tokens} generated",
            file=sys.stderr,
        )
        self._reports(event.edit_reports)

    def _reports(self, reports: Iterable[edits_pb2.EditReport], before: str = "") -> None:
        for report in reports:
            print(
                f"{before}{self._edits[report.edit]} changed {report.tokens_changed} of "
                f"{report.tokens_in_scope} tokens, by {report.mean_relative_size:.3g} |x| on average, "
                f"{report.max_relative_size:.3g} at most",
                file=sys.stderr,
            )

    async def compared(
        self, labels: Sequence[str], responses: AsyncIterator[steering_pb2.CompareResponse]
    ) -> None:
        """Generations side by side; `labels` say what each arm edits."""
        arms = [tables.Arm(label) for label in labels]
        async for response in responses:
            arms[response.arm].take(response)
        _lines(tables.arms(arms, shutil.get_terminal_size().columns))
        for number, arm in enumerate(arms):
            self._edits = arm.edits
            self._reports(arm.finished.edit_reports, f"{number}: ")

    def scored(
        self,
        plain: steering_pb2.ScoreResponse,
        edited: steering_pb2.ScoreResponse | None,
        tokens: bool,
    ) -> None:
        """How likely texts are; with `tokens` each of their tokens, too."""
        _lines(tables.scores(plain, edited, tokens))
        if edited:
            self._edits = [f"{edit.dictionary}:{edit.feature}" for edit in edited.edits]
            for entry in edited.continuations:
                self._reports(entry.edit_reports, f"{''.join(entry.tokens.pieces)!r}: ")

    def patched(
        self, labels: Sequence[str], tokens: Sequence[str], found: steering_pb2.PatchResponse
    ) -> None:
        """What each set of features carries over."""
        _lines(tables.patches(labels, tokens, found))
        strongest = ", ".join(map(str, found.differing_features[:20]))
        print(
            f"{len(found.differing_features)} features differ, by size: {strongest or 'none'}",
            file=sys.stderr,
        )

    def _rows(self, activations: activations_pb2.SparseActivations, file=None) -> None:
        for row in rows(activations):
            shown = "  ".join(f"{feature}={value:.4g}" for feature, value in row.features)
            print(f"{row.position:5d}  {self._pieces[row.position]!r:16}  {shown}", file=file)


def _lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
