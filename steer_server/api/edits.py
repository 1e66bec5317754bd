"""Edits and scopes between proto and domain: checked, with every strength resolved to activations."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from steer.v1 import edits_pb2

from steer_server.admission import MAX_LISTED, MAX_PATCHED, MAX_WINDOWS
from steer_server.dictionary import edits as domain
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import InvalidRequest, UnknownFeature
from steer_server.program import EVERYWHERE, Condition, FeatureEdit, Scope
from steer_server.registry import Registry
from steer_server.units import Unit, finite, in_activations

MAX_EDITS = 64


class Limits(NamedTuple):
    """Of the served model."""

    max_model_len: int
    vocab_size: int


def read_edits(
    messages: Sequence[edits_pb2.Edit], registry: Registry, limits: Limits, path: str
) -> tuple[FeatureEdit, ...]:
    """The edits with strengths in activations; `path` is where the list lies in the request.

    What they name together, and whether the dictionaries know it, is for `admission.check`.
    """
    if len(messages) > MAX_EDITS:
        raise InvalidRequest(f"{len(messages)} edits; at most {MAX_EDITS}", field=path)
    return tuple(
        _read_edit(message, registry, limits, f"{path}[{index}]")
        for index, message in enumerate(messages)
    )


def read_phases(phases: Sequence[int], path: str) -> tuple[bool, bool]:
    """Whether the prompt, and the generated tokens, are named; both if nothing is."""
    for index, phase in enumerate(phases):
        if phase not in (edits_pb2.PHASE_PROMPT, edits_pb2.PHASE_GENERATED):
            raise InvalidRequest(
                f"phase {phase} is neither PHASE_PROMPT (1) nor PHASE_GENERATED (2)",
                field=f"{path}[{index}]",
            )
        if phase in phases[:index]:
            raise InvalidRequest("names a phase twice", field=f"{path}[{index}]")
    return (
        not phases or edits_pb2.PHASE_PROMPT in phases,
        not phases or edits_pb2.PHASE_GENERATED in phases,
    )


def check_vocabulary(tokens: Sequence[int], size: int, path: str) -> None:
    """Each token is one of the model's."""
    for index, token in enumerate(tokens):
        if token >= size:
            raise InvalidRequest(f"token {token} is not in 0..{size - 1}", field=f"{path}[{index}]")


def check_feature(feature: int, stored: StoredDictionary, path: str) -> int:
    """`feature`, if the dictionary has it; else UnknownFeature."""
    n_features = stored.card.n_features
    if not 0 <= feature < n_features:
        raise UnknownFeature(f"feature {feature} is not in 0..{n_features - 1}", field=path)
    return feature


def write_edits(edits: Iterable[FeatureEdit]) -> list[edits_pb2.Edit]:
    """The edits as the server understood them: strengths in activations, scopes filled in."""
    return [_write_edit(entry) for entry in edits]


def op_of(edit: domain.Edit) -> str:
    """The name of the edit's kind in the proto."""
    return "add" if isinstance(edit, domain.AddRelative) else type(edit).__name__.lower()


def _read_edit(
    message: edits_pb2.Edit, registry: Registry, limits: Limits, path: str
) -> FeatureEdit:
    stored = registry.get(message.dictionary, field=f"{path}.dictionary")
    check_feature(message.feature, stored, f"{path}.feature")
    scope, when = EVERYWHERE, None
    if message.HasField("scope"):
        scope = _read_scope(message.scope, limits, f"{path}.scope")
    if message.HasField("when"):
        when = _read_condition(message, f"{path}.when")
    return FeatureEdit(message.dictionary, _read_kind(message, stored, path), scope, when)


def _read_kind(message: edits_pb2.Edit, stored: StoredDictionary, path: str) -> domain.Edit:
    feature = message.feature
    kind = message.WhichOneof("kind")
    strength = _Strengths(stored, feature, f"{path}.{kind}")
    match kind:
        case "ablate":
            return domain.Ablate(feature)
        case "clamp":
            return domain.Clamp(feature, strength.one(message.clamp.value, message.clamp.unit))
        case "scale":
            factor = message.scale.factor
            return domain.Scale(feature, finite(factor, field=f"{path}.scale.factor"))
        case "add" if message.add.unit == edits_pb2.UNIT_RELATIVE_NORM:
            return domain.AddRelative(feature, finite(message.add.value, field=f"{path}.add.value"))
        case "add":
            return domain.Add(feature, strength.one(message.add.value, message.add.unit))
        case "limit":
            return _read_limit(message.limit, feature, strength)
        case "patch":
            return _read_patch(message.patch, feature, strength)
        case _:
            raise InvalidRequest(
                "set one of ablate, clamp, scale, add, limit and patch", field=f"{path}.kind"
            )


def _read_limit(message: edits_pb2.Limit, feature: int, strength: "_Strengths") -> domain.Edit:
    ends = {
        name: strength.one(getattr(message, name), message.unit, name)
        for name in ("low", "high")
        if message.HasField(name)
    }
    if not ends:
        raise InvalidRequest("set low, high or both", field=strength.path)
    limit = domain.Limit(feature, **ends)
    if limit.low > limit.high:
        raise InvalidRequest(
            f"{limit.low:g} is above high, {limit.high:g}", field=f"{strength.path}.low"
        )
    return limit


def _read_patch(message: edits_pb2.Patch, feature: int, strength: "_Strengths") -> domain.Edit:
    positions, values = message.positions, message.values
    if not 1 <= len(positions) <= MAX_PATCHED:
        raise InvalidRequest(
            f"{len(positions)} positions; 1 to {MAX_PATCHED}", field=f"{strength.path}.positions"
        )
    if len(values) != len(positions):
        raise InvalidRequest(
            f"{len(values)} values for {len(positions)} positions", field=f"{strength.path}.values"
        )
    found: dict[int, float] = {}
    for index, (position, value) in enumerate(zip(positions, values, strict=True)):
        if position in found:
            raise InvalidRequest(
                f"position {position} comes twice", field=f"{strength.path}.positions[{index}]"
            )
        found[position] = strength.one(value, message.unit, f"values[{index}]")
    return domain.Patch(feature, tuple(found.items()))


def _read_condition(message: edits_pb2.Edit, path: str) -> Condition:
    when = message.when
    if when.dictionary and not when.HasField("feature"):
        raise InvalidRequest("required with a dictionary", field=f"{path}.feature")
    return Condition(
        when.dictionary or message.dictionary,
        when.feature if when.HasField("feature") else message.feature,
        finite(when.above, field=f"{path}.above"),
    )


_UNITS = {
    edits_pb2.UNIT_ACTIVATION: Unit.ACTIVATION,
    edits_pb2.UNIT_MAX_ACTIVATION_MULTIPLE: Unit.MAX_ACTIVATION_MULTIPLE,
    edits_pb2.UNIT_DECODER_COEFFICIENT: Unit.DECODER_COEFFICIENT,
}


class _Strengths(NamedTuple):
    """Numbers of a feature's edit, turned into activations."""

    stored: StoredDictionary
    feature: int
    path: str
    """Of the edit's kind in the request."""

    def one(self, value: float, unit: edits_pb2.Unit, name: str = "value") -> float:
        """`value`, which the field `name` holds; one too large for a float32 is refused."""
        if unit == edits_pb2.UNIT_UNSPECIFIED:
            raise InvalidRequest("required: say what the value counts", field=f"{self.path}.unit")
        if unit not in _UNITS:
            known = edits_pb2.Unit.Name(unit) if unit in edits_pb2.Unit.values() else unit
            raise InvalidRequest(f"{known} has no meaning here", field=f"{self.path}.unit")
        stored, feature = self.stored, self.feature
        return in_activations(value, _UNITS[unit], stored, feature, field=self.path, name=name)


def _read_scope(message: edits_pb2.Scope, limits: Limits, path: str) -> Scope:
    prompt, generated = read_phases(message.phases, f"{path}.phases")
    excluded = Scope.exclude_positions
    if message.HasField("exclude_positions"):
        where = f"{path}.exclude_positions.positions"
        excluded = _positions(message.exclude_positions.positions, limits, where)
    if len(message.windows) > MAX_WINDOWS:
        raise InvalidRequest(
            f"{len(message.windows)} windows; at most {MAX_WINDOWS}", field=f"{path}.windows"
        )
    return Scope(
        prompt,
        generated,
        positions=_positions(message.positions, limits, f"{path}.positions"),
        windows=tuple(
            _window(window, limits, f"{path}.windows[{index}]")
            for index, window in enumerate(message.windows)
        ),
        token_ids=_tokens(message.token_ids, limits, f"{path}.token_ids"),
        exclude_positions=excluded,
        exclude_token_ids=_tokens(message.exclude_token_ids, limits, f"{path}.exclude_token_ids"),
    )


def _positions(positions: Sequence[int], limits: Limits, path: str) -> frozenset[int]:
    _check_count(positions, path)
    for index, position in enumerate(positions):
        _check_position(position, limits.max_model_len - 1, f"{path}[{index}]")
    return frozenset(positions)


def _window(window: edits_pb2.Window, limits: Limits, path: str) -> tuple[int, int | None]:
    _check_position(window.first, limits.max_model_len - 1, f"{path}.first")
    if not window.HasField("end"):
        return window.first, None
    _check_position(window.end, limits.max_model_len, f"{path}.end")
    return window.first, window.end


def _tokens(tokens: Sequence[int], limits: Limits, path: str) -> frozenset[int]:
    _check_count(tokens, path)
    check_vocabulary(tokens, limits.vocab_size, path)
    return frozenset(tokens)


def _check_count(numbers: Sequence[int], path: str) -> None:
    if len(numbers) > MAX_LISTED:
        raise InvalidRequest(f"{len(numbers)} numbers; at most {MAX_LISTED}", field=path)


def _check_position(position: int, last: int, path: str) -> None:
    if position > last:
        raise InvalidRequest(
            f"position {position} is not in the model's context, at most {last}", field=path
        )


def _write_edit(entry: FeatureEdit) -> edits_pb2.Edit:
    edit = entry.edit
    message = edits_pb2.Edit(
        dictionary=entry.dictionary, feature=edit.feature, scope=_write_scope(entry.scope)
    )
    match edit:
        case domain.Ablate():
            message.ablate.SetInParent()
        case domain.Clamp(_, value):
            message.clamp.CopyFrom(edits_pb2.Clamp(value=value, unit=edits_pb2.UNIT_ACTIVATION))
        case domain.Scale(_, factor):
            message.scale.CopyFrom(edits_pb2.Scale(factor=factor))
        case domain.Add(_, value):
            message.add.CopyFrom(edits_pb2.Add(value=value, unit=edits_pb2.UNIT_ACTIVATION))
        case domain.AddRelative(_, share):
            message.add.CopyFrom(edits_pb2.Add(value=share, unit=edits_pb2.UNIT_RELATIVE_NORM))
        case domain.Limit(_, low, high):
            ends = {"low": low, "high": high}
            known = {name: end for name, end in ends.items() if math.isfinite(end)}
            message.limit.CopyFrom(edits_pb2.Limit(**known, unit=edits_pb2.UNIT_ACTIVATION))
        case domain.Patch(_, values):
            positions, numbers = zip(*values, strict=True)
            message.patch.CopyFrom(
                edits_pb2.Patch(positions=positions, values=numbers, unit=edits_pb2.UNIT_ACTIVATION)
            )
    if entry.when is not None:
        when = entry.when
        message.when.CopyFrom(
            edits_pb2.Condition(dictionary=when.dictionary, feature=when.feature, above=when.above)
        )
    return message


def _write_scope(scope: Scope) -> edits_pb2.Scope:
    named = ((edits_pb2.PHASE_PROMPT, scope.prompt), (edits_pb2.PHASE_GENERATED, scope.generated))
    return edits_pb2.Scope(
        phases=[phase for phase, holds in named if holds],
        exclude_positions=edits_pb2.Positions(positions=sorted(scope.exclude_positions)),
        positions=sorted(scope.positions),
        windows=[edits_pb2.Window(first=first, end=end) for first, end in scope.windows],
        token_ids=sorted(scope.token_ids),
        exclude_token_ids=sorted(scope.exclude_token_ids),
    )
