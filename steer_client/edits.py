"""Edits and read-outs in a line of Python each."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

from steer.v1 import activations_pb2, edits_pb2

Unit = Literal["activation", "max", "norm", "row"]
Phase = Literal["prompt", "generated"]

_PHASES = {"prompt": edits_pb2.PHASE_PROMPT, "generated": edits_pb2.PHASE_GENERATED}
UNITS = {
    "activation": edits_pb2.UNIT_ACTIVATION,
    "max": edits_pb2.UNIT_MAX_ACTIVATION_MULTIPLE,
    "norm": edits_pb2.UNIT_RELATIVE_NORM,
    "row": edits_pb2.UNIT_DECODER_COEFFICIENT,
}


class Feature(NamedTuple):
    """A feature by its dictionary's name and its index; a plain tuple does as well."""

    dictionary: str
    feature: int

    @classmethod
    def parse(cls, text: str) -> "Feature":
        """The feature written as `dictionary:index`; ValueError otherwise."""
        name, colon, index = text.rpartition(":")
        if not (name and colon and index.isascii() and index.isdigit()):
            raise ValueError(f"{text!r} is not DICTIONARY:FEATURE, such as l9:17")
        return cls(name, int(index))

    def __str__(self) -> str:
        return f"{self.dictionary}:{self.feature}"


class Where(TypedDict, total=False):
    """Where an edit holds: at positions that all of these allow; left out, they allow any.

    Positions count from 0 at the first prompt token; negative ones from the prompt's end, -1 being its last token.
    """

    only: Sequence[Phase]
    """Phases: "prompt", "generated"."""
    at: Sequence[int]
    """With `windows`, the only positions."""
    windows: Sequence[tuple[int, int | None]]
    """First position and the one after the last; None: no end."""
    tokens: Sequence[int]
    """Where the model reads one of these tokens."""
    exclude: Sequence[int]
    """Positions to leave out. By default position 0; an empty list leaves out none."""
    exclude_tokens: Sequence[int]
    when: edits_pb2.Condition
    """See `active`."""


def active(feature: tuple[str, int] | None = None, above: float = 0.0) -> edits_pb2.Condition:
    """For `when`: where the feature's activation is above that value; by default the edited feature's above 0."""
    if feature is None:
        return edits_pb2.Condition(above=above)
    dictionary, index = feature
    return edits_pb2.Condition(dictionary=dictionary, feature=index, above=above)


def ablate(feature: tuple[str, int], **where: Unpack[Where]) -> edits_pb2.Edit:
    """The activation becomes 0."""
    edit = _edit(feature, where)
    edit.ablate.SetInParent()
    return edit


def clamp(
    feature: tuple[str, int], value: float, unit: Unit = "activation", **where: Unpack[Where]
) -> edits_pb2.Edit:
    """The activation becomes `value`; unit "max" counts the largest one of its training text."""
    edit = _edit(feature, where)
    edit.clamp.CopyFrom(edits_pb2.Clamp(value=value, unit=UNITS[unit]))
    return edit


def add(
    feature: tuple[str, int], value: float, unit: Unit = "activation", **where: Unpack[Where]
) -> edits_pb2.Edit:
    """`value` is added to the activation; unit "norm" counts lengths of x, "row" decoder rows."""
    edit = _edit(feature, where)
    edit.add.CopyFrom(edits_pb2.Add(value=value, unit=UNITS[unit]))
    return edit


def scale(feature: tuple[str, int], factor: float, **where: Unpack[Where]) -> edits_pb2.Edit:
    """The activation is multiplied by `factor`."""
    edit = _edit(feature, where)
    edit.scale.CopyFrom(edits_pb2.Scale(factor=factor))
    return edit


def limit(
    feature: tuple[str, int],
    low: float | None = None,
    high: float | None = None,
    unit: Unit = "activation",
    **where: Unpack[Where],
) -> edits_pb2.Edit:
    """The activation is brought into [low, high]; None: no such end."""
    edit = _edit(feature, where)
    edit.limit.CopyFrom(edits_pb2.Limit(low=low, high=high, unit=UNITS[unit]))
    return edit


def patch(
    feature: tuple[str, int],
    values: Mapping[int, float],
    unit: Unit = "activation",
    **where: Unpack[Where],
) -> edits_pb2.Edit:
    """At each position of `values` the activation becomes the value there."""
    edit = _edit(feature, where)
    recorded = edits_pb2.Patch(positions=values, values=values.values(), unit=UNITS[unit])
    edit.patch.CopyFrom(recorded)
    return edit


class Read(TypedDict, total=False):
    """How to read."""

    only: Sequence[Phase]
    """Phases: "prompt", "generated"; both by default."""
    after_edits: bool
    """Read x after the request's edits instead of before them."""
    skip_cached: bool
    """Leave out prompt tokens that come from the prefix cache."""


def read_top(dictionary: str, k: int, **how: Unpack[Read]) -> activations_pb2.ReadOut:
    """The `k` strongest features of each token."""
    return activations_pb2.ReadOut(dictionary=dictionary, top_k=k, **_read(how))


def read(dictionary: str, features: Sequence[int], **how: Unpack[Read]) -> activations_pb2.ReadOut:
    """Exactly these features, where they are active."""
    chosen = activations_pb2.FeatureList(features=features)
    return activations_pb2.ReadOut(dictionary=dictionary, features=chosen, **_read(how))


def read_above(
    dictionary: str, threshold: float, row_bytes: int | None = None, **how: Unpack[Read]
) -> activations_pb2.ReadOut:
    """All features above the threshold, as far as `row_bytes` has room for them at 8 bytes each."""
    above = activations_pb2.Above(threshold=threshold, row_bytes=row_bytes)
    return activations_pb2.ReadOut(dictionary=dictionary, above=above, **_read(how))


def _edit(feature: tuple[str, int], where: Where) -> edits_pb2.Edit:
    dictionary, index = feature
    edit = edits_pb2.Edit(dictionary=dictionary, feature=index, when=where.get("when"))
    if where.keys() - {"when"}:
        edit.scope.CopyFrom(_scope(where))
    return edit


def _scope(where: Where) -> edits_pb2.Scope:
    exclude = where.get("exclude")
    return edits_pb2.Scope(
        phases=_phases(where.get("only", ())),
        positions=where.get("at", ()),
        windows=[edits_pb2.Window(first=first, end=end) for first, end in where.get("windows", ())],
        token_ids=where.get("tokens", ()),
        exclude_positions=None if exclude is None else edits_pb2.Positions(positions=exclude),
        exclude_token_ids=where.get("exclude_tokens", ()),
    )


def _read(how: Read) -> dict[str, Any]:
    after = how.get("after_edits", False)
    return {
        "phases": _phases(how.get("only", ())),
        "stage": activations_pb2.STAGE_AFTER_EDITS if after else activations_pb2.STAGE_UNSPECIFIED,
        "skip_cached": how.get("skip_cached", False),
    }


def _phases(only: Sequence[Phase]) -> list[edits_pb2.Phase]:
    return [_PHASES[name] for name in only]


def size_limit(
    max_relative_size: float, oversize: Literal["reject", "clamp", "warn"] = "reject"
) -> edits_pb2.SizeLimit:
    """The edits may move x, at each token, by so many times its length; what happens where they would go further."""
    kinds = {
        "reject": edits_pb2.OVERSIZE_REJECT,
        "clamp": edits_pb2.OVERSIZE_CLAMP,
        "warn": edits_pb2.OVERSIZE_WARN,
    }
    return edits_pb2.SizeLimit(max_relative_size=max_relative_size, oversize=kinds[oversize])
