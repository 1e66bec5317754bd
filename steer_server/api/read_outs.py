"""Read-outs between proto and domain."""

from collections.abc import Iterable, Sequence
from typing import Any

from steer.v1 import activations_pb2, edits_pb2

from steer_server.admission import (
    MAX_FEATURES,
    MAX_READ_OUTS,
    MAX_ROW_BYTES,
    MAX_TOP_K,
    check_row_bytes,
)
from steer_server.api.edits import check_feature, read_phases
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import InvalidRequest
from steer_server.program import ENTRY_BYTES, ReadOut
from steer_server.registry import Registry
from steer_server.units import finite


def read_read_outs(
    messages: Sequence[activations_pb2.ReadOut], registry: Registry, path: str
) -> tuple[ReadOut, ...]:
    if len(messages) > MAX_READ_OUTS:
        raise InvalidRequest(f"{len(messages)} read-outs; at most {MAX_READ_OUTS}", field=path)
    found = tuple(
        _read_read_out(message, registry, f"{path}[{index}]")
        for index, message in enumerate(messages)
    )
    check_row_bytes(found, field=path)
    return found


def read_features(features: Sequence[int], stored: StoredDictionary, path: str) -> tuple[int, ...]:
    """1 to MAX_FEATURES different ones of the dictionary."""
    if not 1 <= len(features) <= MAX_FEATURES:
        raise InvalidRequest(f"{len(features)} features; 1 to {MAX_FEATURES}", field=path)
    for index, feature in enumerate(features):
        check_feature(feature, stored, f"{path}[{index}]")
    if len(set(features)) < len(features):
        raise InvalidRequest("names a feature twice", field=path)
    return tuple(features)


def write_read_outs(read_outs: Iterable[ReadOut]) -> list[activations_pb2.ReadOut]:
    """The read-outs as the server understood them, every field filled in."""
    return [_write_read_out(entry) for entry in read_outs]


def _read_read_out(message: activations_pb2.ReadOut, registry: Registry, path: str) -> ReadOut:
    stored = registry.get(message.dictionary, field=f"{path}.dictionary")
    prompt, generated = read_phases(message.phases, f"{path}.phases")
    if message.stage not in activations_pb2.Stage.values():
        raise InvalidRequest(
            f"stage {message.stage} is neither STAGE_BEFORE_EDITS (1) nor STAGE_AFTER_EDITS (2)",
            field=f"{path}.stage",
        )
    return ReadOut(
        message.dictionary,
        **_read_selection(message, stored, path),
        prompt=prompt,
        generated=generated,
        edited=message.stage == activations_pb2.STAGE_AFTER_EDITS,
        complete=not message.skip_cached,
    )


def _read_selection(
    message: activations_pb2.ReadOut, stored: StoredDictionary, path: str
) -> dict[str, Any]:
    match message.WhichOneof("selection"):
        case "top_k":
            if not 1 <= message.top_k <= MAX_TOP_K:
                raise InvalidRequest(
                    f"{message.top_k} is not in 1..{MAX_TOP_K}", field=f"{path}.top_k"
                )
            return {"top_k": min(message.top_k, stored.card.n_features)}
        case "features":
            where = f"{path}.features.features"
            return {"features": read_features(message.features.features, stored, where)}
        case "above":
            return _read_above(message.above, f"{path}.above")
        case _:
            raise InvalidRequest("set one of top_k, features and above", field=f"{path}.selection")


def _read_above(message: activations_pb2.Above, path: str) -> dict[str, Any]:
    threshold = finite(message.threshold, field=f"{path}.threshold")
    if threshold < 0:
        raise InvalidRequest(f"{threshold:g} is not at least 0", field=f"{path}.threshold")
    if not message.HasField("row_bytes"):
        return {"above": threshold}
    if not ENTRY_BYTES <= message.row_bytes <= MAX_ROW_BYTES:
        raise InvalidRequest(
            f"{message.row_bytes} is not in {ENTRY_BYTES}..{MAX_ROW_BYTES}",
            field=f"{path}.row_bytes",
        )
    return {"above": threshold, "row_bytes": message.row_bytes}


def _write_read_out(entry: ReadOut) -> activations_pb2.ReadOut:
    named = ((edits_pb2.PHASE_PROMPT, entry.prompt), (edits_pb2.PHASE_GENERATED, entry.generated))
    before, after = activations_pb2.STAGE_BEFORE_EDITS, activations_pb2.STAGE_AFTER_EDITS
    message = activations_pb2.ReadOut(
        dictionary=entry.dictionary,
        phases=[phase for phase, holds in named if holds],
        stage=after if entry.edited else before,
        skip_cached=not entry.complete,
    )
    if entry.top_k:
        message.top_k = entry.top_k
    elif entry.features:
        message.features.features.extend(entry.features)
    else:
        above = activations_pb2.Above(threshold=entry.above, row_bytes=entry.row_bytes)
        message.above.CopyFrom(above)
    return message
