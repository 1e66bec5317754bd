"""What the `steer` command prints of experiments: lines for people."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from steer.v1 import steering_pb2

_NARROWEST = 24
"""Characters of a column; more arms than fit beside each other go below."""
_GAP = 3


class Arm:
    """One arm of a comparison, as its events come."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.edits: list[str] = []
        """Features, as reports number them."""
        self.finished = steering_pb2.Finished()
        self.divergence: steering_pb2.Divergence | None = None
        self._parts: list[steering_pb2.Tokens] = []

    def take(self, response: steering_pb2.CompareResponse) -> None:
        match response.WhichOneof("event"):
            case "started":
                self.edits = [f"{e.dictionary}:{e.feature}" for e in response.started.edits]
            case "tokens":
                self._parts.append(response.tokens)
            case "finished":
                self.finished = response.finished
            case "divergence":
                self.divergence = response.divergence

    @property
    def parts_at(self) -> int | None:
        """The first token that is another than arm 0's; None: all are the same."""
        divergence = self.divergence
        if divergence is None or not divergence.HasField("first_index"):
            return None
        return divergence.first_index

    @property
    def text(self) -> str:
        """Its text; the token on which it parts from arm 0 is in brackets."""
        at = self.parts_at
        return "".join(
            f"[{part.text}]" if at is not None and _holds(part, at) else part.text
            for part in self._parts
        )

    def token(self, index: int) -> str:
        """As people read it; its id where the text of several tokens came as one."""
        for part in self._parts:
            if _holds(part, index):
                alone = len(part.ids) == 1 and part.text
                return repr(part.text) if alone else f"token {part.ids[index - part.first_index]}"
        return "the end"


def _holds(part: steering_pb2.Tokens, index: int) -> bool:
    return part.first_index <= index < part.first_index + len(part.ids)


def arms(found: Sequence[Arm], width: int) -> Iterator[str]:
    """The texts side by side as far as `width` allows, and below where each parts from the first."""
    beside = max(1, min(len(found), (width + _GAP) // (_NARROWEST + _GAP)))
    column = (width - _GAP * (beside - 1)) // beside
    for first in range(0, len(found), beside):
        row = list(enumerate(found[first : first + beside], first))
        yield from _beside([f"{number}: {arm.label}" for number, arm in row], column)
        yield from _beside(["-" * column] * len(row), column)
        yield from _beside([arm.text for _, arm in row], column)
        yield ""
    for number, arm in enumerate(found):
        if arm.divergence is not None:
            yield f"{number}: {_parted(found[0], arm, arm.divergence)}"


def _beside(texts: Sequence[str], width: int) -> Iterator[str]:
    for lines in zip_longest(*(_wrapped(text, width) for text in texts), fillvalue=""):
        yield (" " * _GAP).join(line.ljust(width) for line in lines).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    lines = text.expandtabs().split("\n")
    return [part for line in lines for part in textwrap.wrap(_printable(line), width) or [""]]


def _printable(text: str) -> str:
    """With escapes for what would move the cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _parted(first: Arm, arm: Arm, divergence: steering_pb2.Divergence) -> str:
    nats = divergence.mean_logprob_change
    way = f"{'more' if nats > 0 else 'less'} likely by {abs(nats):.3g} nats a token"
    likely = f"0's text is {way if nats else 'as likely'}"
    if arm.parts_at is None:
        return f"the same tokens; {likely}"
    there, here = first.token(arm.parts_at), arm.token(arm.parts_at)
    return f"parts at token {arm.parts_at}, {here} instead of {there}; {likely}"


def scores(
    plain: steering_pb2.ScoreResponse, edited: steering_pb2.ScoreResponse | None, tokens: bool
) -> Iterator[str]:
    """The log-probability of each continuation, then, if asked for, of each of its tokens."""
    changed = edited.continuations if edited else plain.continuations
    yield _columns(edited, "log-prob", "edited", "change") + "  tokens  continuation"
    for before, after in zip(plain.continuations, changed, strict=True):
        values = _numbers(edited, before.logprob, after.logprob)
        yield f"{values}  {len(before.logprobs):6d}  {''.join(before.tokens.pieces)!r}"
        if tokens:
            rows = zip(before.logprobs, after.logprobs, before.tokens.pieces, strict=True)
            for one, other, piece in rows:
                yield f"{_numbers(edited, one, other)}            {piece!r}"


def _numbers(edited: object | None, before: float, after: float) -> str:
    return _columns(edited, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")


def _columns(edited: object | None, before: str, after: str, change: str) -> str:
    """With nothing edited there is one number."""
    return _cells((before, after, change) if edited else (before,))


def patches(
    labels: Sequence[str], tokens: Sequence[str], response: steering_pb2.PatchResponse
) -> Iterator[str]:
    """The source, the target, and the target with each set of features patched."""
    names = ["(source)", "(target)", *labels]
    width = max(map(len, names))
    kl = response.source_target_kl
    columns = [
        ("0.0000", "", "", ""),
        (f"{kl:.4f}", "0.0000", "0", "0"),
        *(
            (
                f"{result.source_kl:.4f}",
                f"{result.target_kl:.4f}",
                f"{result.edit_norm:.4g}",
                str(result.patched_features),
            )
            for result in response.results
        ),
    ]
    followed = [response.source_next, response.target_next, *(r.next for r in response.results)]
    titles = ("KL source", "KL target", "|edit|", "patched", *map(repr, tokens))
    yield f"{_cells(titles)}  {'features'.ljust(width)}  next"
    for name, numbers, following in zip(names, columns, followed, strict=True):
        cells = (*numbers, *(f"{logprob:.4f}" for logprob in following.token_logprobs))
        yield f"{_cells(cells)}  {name.ljust(width)}  {_likeliest(following)}"


def _cells(entries: Sequence[str]) -> str:
    return "  ".join(f"{entry:>9}" for entry in entries)


def _likeliest(following: steering_pb2.NextToken) -> str:
    pairs = zip(following.pieces, following.logprobs, strict=True)
    return "  ".join(f"{piece!r} {math.exp(logprob):.1%}" for piece, logprob in pairs)
