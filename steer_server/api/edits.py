"""Edits and scopes between proto and domain: checked, with every strength resolved to activations."""

from collections.abc import Iterable, Sequence

from steer.v1 import edits_pb2

from steer_server.admission import MAX_EDITS
from steer_server.dictionary import edits as domain
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import (
    ConflictingEdits,
    InvalidRequest,
    UnknownFeature,
)
from steer_server.program import FeatureEdit, Scope
from steer_server.registry import Registry
from steer_server.units import Unit, finite, in_activations

MAX_EXCLUDED = 1024


def read_edits(
    messages: Sequence[edits_pb2.Edit], registry: Registry, max_model_len: int, path: str
) -> tuple[FeatureEdit, ...]:
    """The edits with strengths in activations; `path` is where the list lies in the request."""
    if len(messages) > MAX_EDITS:
        raise InvalidRequest(f"{len(messages)} edits; at most {MAX_EDITS}", field=path)
    found: list[FeatureEdit] = []
    seen: dict[tuple[str, int], int] = {}
    for index, message in enumerate(messages):
        here = f"{path}[{index}]"
        entry = _read_edit(message, registry, max_model_len, here)
        first = seen.setdefault((entry.dictionary, entry.edit.feature), index)
        if first != index:
            raise ConflictingEdits(
                f"feature {entry.edit.feature} of {entry.dictionary!r} is already edited by "
                f"{path}[{first}]; name each feature once",
                field=f"{here}.feature",
            )
        found.append(entry)
    return tuple(found)


def check_scopes(
    edits: Sequence[FeatureEdit], prompt_length: int, max_tokens: int, path: str
) -> None:
    """Each edit holds at one of the positions that the generation computes, or is refused."""
    rows = prompt_length + max_tokens - 1
    for index, entry in enumerate(edits):
        if not entry.where.holds_somewhere(rows, prompt_length):
            raise InvalidRequest(
                f"holds at none of the positions 0..{rows - 1} that this request computes; "
                "a default scope leaves out position 0",
                field=f"{path}[{index}].scope",
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
    message: edits_pb2.Edit, registry: Registry, max_model_len: int, path: str
) -> FeatureEdit:
    stored = registry.get(message.dictionary, field=f"{path}.dictionary")
    check_feature(message.feature, stored, f"{path}.feature")
    scope = Scope()
    if message.HasField("scope"):
        scope = _read_scope(message.scope, max_model_len, f"{path}.scope")
    return FeatureEdit(message.dictionary, _read_kind(message, stored, path), scope)


def _read_kind(message: edits_pb2.Edit, stored: StoredDictionary, path: str) -> domain.Edit:
    feature = message.feature
    match message.WhichOneof("kind"):
        case "ablate":
            return domain.Ablate(feature)
        case "clamp":
            return domain.Clamp(feature, _strength(message.clamp, stored, feature, f"{path}.clamp"))
        case "scale":
            factor = message.scale.factor
            return domain.Scale(feature, finite(factor, field=f"{path}.scale.factor"))
        case "add" if message.add.unit == edits_pb2.UNIT_RELATIVE_NORM:
            return domain.AddRelative(feature, finite(message.add.value, field=f"{path}.add.value"))
        case "add":
            return domain.Add(feature, _strength(message.add, stored, feature, f"{path}.add"))
        case _:
            raise InvalidRequest("set one of ablate, clamp, scale and add", field=f"{path}.kind")


_UNITS = {
    edits_pb2.UNIT_ACTIVATION: Unit.ACTIVATION,
    edits_pb2.UNIT_MAX_ACTIVATION_MULTIPLE: Unit.MAX_ACTIVATION_MULTIPLE,
    edits_pb2.UNIT_DECODER_COEFFICIENT: Unit.DECODER_COEFFICIENT,
}


def _strength(
    amount: edits_pb2.Clamp | edits_pb2.Add, stored: StoredDictionary, feature: int, path: str
) -> float:
    """The amount in activations; one too large for a float32 is refused."""
    unit = amount.unit
    if unit == edits_pb2.UNIT_UNSPECIFIED:
        raise InvalidRequest("required: say what the value counts", field=f"{path}.unit")
    if unit not in _UNITS:
        known = edits_pb2.Unit.Name(unit) if unit in edits_pb2.Unit.values() else unit
        raise InvalidRequest(f"{known} has no meaning here", field=f"{path}.unit")
    return in_activations(amount.value, _UNITS[unit], stored, feature, field=path)


def _read_scope(message: edits_pb2.Scope, max_model_len: int, path: str) -> Scope:
    prompt, generated = read_phases(message.phases, f"{path}.phases")
    if not message.HasField("exclude_positions"):
        return Scope(prompt, generated)
    positions = message.exclude_positions.positions
    where = f"{path}.exclude_positions.positions"
    if len(positions) > MAX_EXCLUDED:
        raise InvalidRequest(f"{len(positions)} positions; at most {MAX_EXCLUDED}", field=where)
    for index, position in enumerate(positions):
        if position >= max_model_len:
            raise InvalidRequest(
                f"position {position} is not in the model's context, 0..{max_model_len - 1}",
                field=f"{where}[{index}]",
            )
    return Scope(prompt, generated, exclude_positions=frozenset(positions))


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
    return message


def _write_scope(scope: Scope) -> edits_pb2.Scope:
    named = ((edits_pb2.PHASE_PROMPT, scope.prompt), (edits_pb2.PHASE_GENERATED, scope.generated))
    return edits_pb2.Scope(
        phases=[phase for phase, holds in named if holds],
        exclude_positions=edits_pb2.Positions(positions=sorted(scope.exclude_positions)),
    )
