"""What a client does to the server, and an account of what it saw."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from steer.v1 import activations_pb2, edits_pb2, steering_pb2

from steer_client import CallFailed, SteerClient, ablate, add, clamp, read, read_top, rows, scale

NAME = "random"
WATCHED = tuple(range(40, 80))
UNKNOWN = 4608
TEXTS = ("The capital of France is", "Once upon a time there was a king who", "One, two, three,")

_REASONS = {
    steering_pb2.FINISH_REASON_STOP: "stop",
    steering_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass
class Seen:
    """Counts from the client's side, under the labels that the metrics have."""

    nonzero: Counter[int] = field(default_factory=Counter)
    """By watched feature: rows on which it was active."""
    total: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    """By watched feature: sum of its activations."""
    rows: int = 0
    """Computed positions."""
    full_width_rows: int = 0
    active: int = 0
    """Active features, over the rows read at full width."""
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By phase and steered."""
    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By RPC, steered and reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """By kind of edit: tokens whose activation it changed."""
    reports: int = 0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By method and status."""
    updates: int = 0

    def read(self, activations: Iterable[activations_pb2.SparseActivations]) -> None:
        for entry in activations:
            for row in rows(entry):
                if row.active is not None:
                    self.full_width_rows += 1
                    self.active += row.active
                    continue
                self.rows += 1
                for feature, value in row.features:
                    self.nonzero[feature] += 1
                    self.total[feature] += value

    def finished(
        self,
        event: steering_pb2.Finished,
        rpc: str,
        revisions: Sequence[Sequence[edits_pb2.Edit]],
    ) -> None:
        steered = "1" if any(revisions) else "0"
        self.tokens["prompt", steered] += event.usage.prompt_tokens
        self.tokens["generated", steered] += event.usage.generated_tokens
        self.requests[rpc, steered, _REASONS[event.reason]] += 1
        for report in event.edit_reports:
            edit = revisions[report.revision][report.edit]
            self.changed[edit.WhichOneof("kind") or ""] += report.tokens_changed
            self.reports += 1


READ = (read(NAME, WATCHED), read_top(NAME, 8))


def edits_for(seen: Seen) -> tuple[edits_pb2.Edit, ...]:
    """One of each kind; ablate and scale change only what is active, so they get what often is."""
    first, second = (feature for feature, _ in seen.nonzero.most_common(2))
    return (
        clamp((NAME, 3), 40.0),
        add((NAME, 9), 0.3, "norm"),
        ablate((NAME, first)),
        scale((NAME, second), 2.0),
    )


async def run_round(client: SteerClient, seen: Seen) -> None:
    """One of every kind of call."""
    for text in TEXTS:
        await _encode(client, seen, text)
    edits = edits_for(seen)
    await _generate(client, seen, TEXTS[0], ())
    await _generate(client, seen, TEXTS[1], edits)
    await _session(client, seen, [edits[:1], edits[1:3]])
    await _refused(client, seen)


async def _encode(client: SteerClient, seen: Seen, text: str) -> None:
    async for response in client.encode(text, READ):
        seen.tokens["prompt", "0"] += len(response.tokens.ids)
        seen.read(response.activations)
    # It generates one token and throws it away.
    seen.tokens["generated", "0"] += 1
    seen.requests["Encode", "0", "length"] += 1
    seen.calls["Encode", "OK"] += 1


async def _generate(
    client: SteerClient, seen: Seen, text: str, edits: Sequence[edits_pb2.Edit]
) -> None:
    events = client.generate(text, edits=edits, read_outs=READ, max_tokens=12, temperature=0.0)
    async for event in events:
        if isinstance(event, steering_pb2.Tokens):
            seen.read(event.activations)
        elif isinstance(event, steering_pb2.Finished):
            seen.finished(event, "GenerateStream", [edits])
    seen.calls["GenerateStream", "OK"] += 1


async def _session(
    client: SteerClient, seen: Seen, revisions: Sequence[Sequence[edits_pb2.Edit]]
) -> None:
    """A turn whose edits are replaced while it runs."""
    async with client.session() as session:
        await session.start(
            TEXTS[2],
            edits=revisions[0],
            read_outs=READ,
            max_tokens=40,
            temperature=0.0,
            ignore_eos=True,
        )
        async for event in _closing(session, revisions[1]):
            if isinstance(event, steering_pb2.Tokens):
                seen.read(event.activations)
            elif isinstance(event, steering_pb2.UpdateApplied):
                seen.updates += 1
            elif isinstance(event, steering_pb2.Finished):
                seen.finished(event, "Session", revisions)
    seen.calls["Session", "OK"] += 1


async def _closing(session, edits: Sequence[edits_pb2.Edit]) -> AsyncIterator:
    """The session's events; updates after the first tokens, half-closes after the turn."""
    updated = False
    async for event in session:
        yield event
        if isinstance(event, steering_pb2.Tokens) and not updated:
            updated = True
            await session.update(edits)
        elif isinstance(event, steering_pb2.Finished):
            await session.half_close()


async def _refused(client: SteerClient, seen: Seen) -> None:
    with pytest.raises(CallFailed) as failure:
        async for _ in client.generate(TEXTS[0], edits=[ablate((NAME, UNKNOWN))]):
            pass
    assert failure.value.reason == "UNKNOWN_FEATURE"
    seen.calls["GenerateStream", failure.value.code.name] += 1
