"""Edits and read-outs in a line of Python each."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from steer.v1 import activations_pb2, edits_pb2

Unit = Literal["activation", "max", "norm", "row"]
Phase = Literal["prompt", "generated"]

_PHASES = {"prompt": edits_pb2.PHASE_PROMPT, "generated": edits_pb2.PHASE_GENERATED}
_UNITS = {
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


def ablate(
    feature: tuple[str, int], *, only: Sequence[Phase] = (), exclude: Sequence[int] | None = None
) -> edits_pb2.Edit:
    """The activation becomes 0.

    For this and the other edits: `only` names the phases they hold in ("prompt", "generated"; empty
    means both), `exclude` the positions they leave out (None means position 0, an empty list none).
    """
    edit = _edit(feature, only, exclude)
    edit.ablate.SetInParent()
    return edit


def clamp(
    feature: tuple[str, int],
    value: float,
    unit: Unit = "activation",
    *,
    only: Sequence[Phase] = (),
    exclude: Sequence[int] | None = None,
) -> edits_pb2.Edit:
    """The activation becomes `value`; unit "max" counts the largest one of its training text."""
    edit = _edit(feature, only, exclude)
    edit.clamp.CopyFrom(edits_pb2.Clamp(value=value, unit=_UNITS[unit]))
    return edit


def add(
    feature: tuple[str, int],
    value: float,
    unit: Unit = "activation",
    *,
    only: Sequence[Phase] = (),
    exclude: Sequence[int] | None = None,
) -> edits_pb2.Edit:
    """`value` is added to the activation; unit "norm" counts lengths of x, "row" decoder rows."""
    edit = _edit(feature, only, exclude)
    edit.add.CopyFrom(edits_pb2.Add(value=value, unit=_UNITS[unit]))
    return edit


def scale(
    feature: tuple[str, int],
    factor: float,
    *,
    only: Sequence[Phase] = (),
    exclude: Sequence[int] | None = None,
) -> edits_pb2.Edit:
    """The activation is multiplied by `factor`."""
    edit = _edit(feature, only, exclude)
    edit.scale.CopyFrom(edits_pb2.Scale(factor=factor))
    return edit


def read_top(dictionary: str, k: int, *, only: Sequence[Phase] = ()) -> activations_pb2.ReadOut:
    """The `k` strongest features of each token."""
    return activations_pb2.ReadOut(dictionary=dictionary, top_k=k, phases=_phases(only))


def read(
    dictionary: str, features: Sequence[int], *, only: Sequence[Phase] = ()
) -> activations_pb2.ReadOut:
    """Exactly these features, where they are active."""
    chosen = activations_pb2.FeatureList(features=features)
    return activations_pb2.ReadOut(dictionary=dictionary, features=chosen, phases=_phases(only))


def _edit(
    feature: tuple[str, int], only: Sequence[Phase], exclude: Sequence[int] | None
) -> edits_pb2.Edit:
    dictionary, index = feature
    edit = edits_pb2.Edit(dictionary=dictionary, feature=index)
    if only:
        edit.scope.phases.extend(_phases(only))
    if exclude is not None:
        edit.scope.exclude_positions.CopyFrom(edits_pb2.Positions(positions=exclude))
    return edit


def _phases(only: Sequence[Phase]) -> list[edits_pb2.Phase]:
    return [_PHASES[name] for name in only]
