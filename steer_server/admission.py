"""What a request's program must be before it may run, and what of it travels to the worker."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from steer_server.dictionary.edits import Patch
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from steer_server.errors import (
    ConflictingEdits,
    DictionaryMismatch,
    DictionaryNotFound,
    InvalidRequest,
    Overloaded,
    UnknownFeature,
)
from steer_server.program import (
    ENTRY_BYTES,
    MAX_RELATIVE_SIZE,
    Condition,
    Oversize,
    Program,
    ReadOut,
)
from steer_server.program_json import from_json, to_json

MAX_EDITS = 1024
"""Of a program: as many as a row of the op's tables has room for. What clients may send is for who answers them."""
MAX_READ_OUTS = 8
"""That a client may send."""
MAX_LISTED = 1024
"""Positions, or tokens, of one list of a client's scope."""
MAX_WINDOWS = 64
MAX_PATCHED = 4096
MAX_PLACES = 64
"""Scopes, and lists of patched positions, that differ in a client's program."""
MAX_PATCHED_TOGETHER = 64 * MAX_PATCHED
"""By all edits of a client's program: what 64 of them, gRPC's limit, may."""
MAX_FEATURES = 256
MAX_TOP_K = 128
MAX_ROW_BYTES = 32_768
"""That the read-outs of a client's program may list of a row, all together."""
MAX_UPDATES = 256
"""Of one generation."""

Dictionaries = Mapping[str, StoredDictionary]


def parse(content: Any, dictionaries: Dictionaries) -> Program:
    """The program that a request of plain vLLM carries: JSON, as text or parsed."""
    if isinstance(content, Program):
        return content
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise InvalidRequest(f"is not JSON: {error}", field="") from error
    program = from_json(content, dictionaries)
    # A program that comes ready has those of the watched features beside its client's.
    if len(program.read_outs) > MAX_READ_OUTS:
        count = len(program.read_outs)
        raise InvalidRequest(f"{count} read-outs; at most {MAX_READ_OUTS}", field="read_outs")
    _check_sizes(program)
    check_row_bytes(program.read_outs)
    return program


def check_row_bytes(read_outs: Sequence[ReadOut], *, field: str = "read_outs") -> None:
    """InvalidRequest if a client's read-outs may list too much of a row, all together."""
    # One that is too much by itself is refused by its own place.
    most = MAX_ROW_BYTES // ENTRY_BYTES
    listed = sum(min(entry.limit, most) for entry in read_outs) * ENTRY_BYTES
    if listed > MAX_ROW_BYTES:
        raise InvalidRequest(
            f"they list up to {listed} bytes of a token; at most {MAX_ROW_BYTES} together",
            field=field,
        )


def _check_sizes(program: Program) -> None:
    """What its edits list, the worker goes through between two steps of the model."""
    for index, entry in enumerate(program.edits):
        scope, path = entry.scope, f"edits[{index}]"
        for name, listed, most in (
            ("scope.positions", scope.positions, MAX_LISTED),
            ("scope.token_ids", scope.token_ids, MAX_LISTED),
            ("scope.exclude_positions", scope.exclude_positions, MAX_LISTED),
            ("scope.exclude_token_ids", scope.exclude_token_ids, MAX_LISTED),
            ("scope.windows", scope.windows, MAX_WINDOWS),
            (
                "patch.values",
                entry.edit.values if isinstance(entry.edit, Patch) else (),
                MAX_PATCHED,
            ),
        ):
            if len(listed) > most:
                raise InvalidRequest(f"lists {len(listed)}; at most {most}", field=f"{path}.{name}")
    edits = (entry.edit for entry in program.edits)
    patched = sum(len(edit.values) for edit in edits if isinstance(edit, Patch))
    if patched > MAX_PATCHED_TOGETHER:
        raise InvalidRequest(
            f"{patched} positions patched; at most {MAX_PATCHED_TOGETHER} together", field="edits"
        )
    if len(program.groups) > MAX_PLACES:
        raise InvalidRequest(
            f"edits at {len(program.groups)} different sets of positions or tokens; at most {MAX_PLACES}",
            field="edits",
        )


def check(program: Program, dictionaries: Dictionaries) -> None:
    """Every name, index and number of the program is one that the resident dictionaries know."""
    if len(program.edits) > MAX_EDITS:
        raise InvalidRequest(f"{len(program.edits)} edits; at most {MAX_EDITS}", field="edits")
    _limit(program)
    seen: dict[tuple[str, int], int] = {}
    for index, entry in enumerate(program.edits):
        name, feature = entry.dictionary, entry.edit.feature
        stored = dictionaries.get(name)
        if stored is None:
            raise _not_resident(name, dictionaries, f"edits[{index}].dictionary")
        if not 0 <= feature < stored.card.n_features:
            raise _unknown(feature, stored, f"edits[{index}].feature")
        first = seen.setdefault((name, feature), index)
        if first != index:
            raise ConflictingEdits(
                f"feature {feature} of {name!r} is already edited by edits[{first}]; name each feature once",
                field=f"edits[{index}].feature",
            )
        if entry.when is not None:
            _condition(entry.when, stored, dictionaries, f"edits[{index}].when")
    for index, entry in enumerate(program.read_outs):
        _read_out(entry, dictionaries, f"read_outs[{index}]")


def check_scopes(program: Program, prompt_length: int, max_tokens: int) -> None:
    """Each edit of the resolved program may hold at one of the positions that the request computes."""
    rows = prompt_length + max_tokens - 1
    for where, indices in program.groups.items():
        if not where.holds_somewhere(rows, prompt_length):
            raise InvalidRequest(
                f"holds at none of the positions 0..{rows - 1} that this request computes; "
                "a default scope leaves out position 0",
                field=f"edits[{indices[0]}].scope",
            )


def wire(
    program: Program, dictionaries: Dictionaries, sites: list[Site], slots: int
) -> dict[str, Any]:
    """`program` for the scheduler and the workers; InvalidRequest if no engine of this size could ever run it."""
    check_slots(program.features, dictionaries, slots)
    features = _located(program.features, dictionaries, sites)
    return {"program": msgspec.json.encode(to_json(program)).decode(), "features": features}


def check_slots(
    features: Collection[tuple[str, int]], dictionaries: Dictionaries, slots: int
) -> None:
    """InvalidRequest if a program's features could never have their slots all at once."""
    for site, needed in _too_many(features, dictionaries, slots):
        raise InvalidRequest(
            f"the edits need {needed} slots at {site}, the engine has {slots}; name fewer features",
            field="edits",
        )


def check_revisions(programs: Sequence[Program], dictionaries: Dictionaries, slots: int) -> None:
    """Overloaded if one generation has more programs than it may, or they could never have their slots all at once.

    A generation keeps those of its earlier programs, which a preemption replays, so it would wait for itself.
    """
    # The first one is no update.
    if len(programs) > MAX_UPDATES + 1:
        raise Overloaded(f"a generation takes at most {MAX_UPDATES} updates; go on in a new one")
    features = set().union(*(program.features for program in programs))
    for site, needed in _too_many(features, dictionaries, slots):
        raise Overloaded(
            f"with this update the generation has edited {needed} features at {site}, the engine has "
            f"{slots} slots; go on in a new one"
        )


def _located(
    features: Collection[tuple[str, int]], dictionaries: Dictionaries, sites: list[Site]
) -> list[tuple[int, str, int]]:
    """(number of its site, dictionary, feature) of each, in order."""
    names = {name for name, _ in features}
    number = {name: sites.index(dictionaries[name].card.site) for name in names}
    return sorted((number[name], name, feature) for name, feature in features)


def _too_many(
    features: Collection[tuple[str, int]], dictionaries: Dictionaries, slots: int
) -> list[tuple[Site, int]]:
    """The sites that have not so many slots, and how many they would need."""
    if len(features) <= slots:
        return []
    needed = Counter(dictionaries[name].card.site for name, _ in features)
    return [(site, count) for site, count in needed.items() if count > slots]


def _condition(
    when: Condition, stored: StoredDictionary, dictionaries: Dictionaries, path: str
) -> None:
    other = _dictionary(when.dictionary, dictionaries, f"{path}.dictionary")
    _feature(when.feature, other, f"{path}.feature")
    if other.card.site != stored.card.site:
        raise DictionaryMismatch(
            f"a condition is of the edit's own site, {stored.card.site}; dictionary "
            f"{when.dictionary!r} is of {other.card.site}",
            field=f"{path}.dictionary",
        )


def _dictionary(name: str, dictionaries: Dictionaries, path: str) -> StoredDictionary:
    if name not in dictionaries:
        raise _not_resident(name, dictionaries, path)
    return dictionaries[name]


def _feature(feature: int, stored: StoredDictionary, path: str) -> None:
    if not 0 <= feature < stored.card.n_features:
        raise _unknown(feature, stored, path)


def _not_resident(name: str, dictionaries: Dictionaries, path: str) -> DictionaryNotFound:
    there = ", ".join(sorted(dictionaries)) or "none"
    return DictionaryNotFound(
        f"no dictionary {name[:64]!r} is resident; there are: {there}", name=name[:64], field=path
    )


def _unknown(feature: int, stored: StoredDictionary, path: str) -> UnknownFeature:
    return UnknownFeature(
        f"feature {feature} is not in 0..{stored.card.n_features - 1}", field=path
    )


def _limit(program: Program) -> None:
    limit = program.max_relative_size
    if limit is None and program.oversize is not Oversize.REJECT:
        raise InvalidRequest(
            f"{program.oversize} asks for a limit; set max_relative_size", field="oversize"
        )
    if limit is not None and not 0 < limit < MAX_RELATIVE_SIZE:
        raise InvalidRequest(
            f"{limit:g} is not above 0 and below {MAX_RELATIVE_SIZE:g}", field="max_relative_size"
        )


def _read_out(entry: ReadOut, dictionaries: Dictionaries, path: str) -> None:
    stored = _dictionary(entry.dictionary, dictionaries, f"{path}.dictionary")
    chosen = [entry.top_k > 0, bool(entry.features), entry.above is not None]
    if sum(chosen) != 1:
        raise InvalidRequest("set one of top_k, features and above", field=path)
    if not 0 <= entry.top_k <= MAX_TOP_K:
        raise InvalidRequest(f"{entry.top_k} is not in 1..{MAX_TOP_K}", field=f"{path}.top_k")
    if len(entry.features) > MAX_FEATURES:
        raise InvalidRequest(
            f"{len(entry.features)} features; at most {MAX_FEATURES}", field=f"{path}.features"
        )
    if len(set(entry.features)) < len(entry.features):
        raise InvalidRequest("names a feature twice", field=f"{path}.features")
    for feature in entry.features:
        _feature(feature, stored, f"{path}.features")
    if entry.above is not None and not entry.above >= 0:
        raise InvalidRequest(f"{entry.above} is not at least 0", field=f"{path}.above")
    if not 8 <= entry.row_bytes <= MAX_ROW_BYTES:
        raise InvalidRequest(
            f"{entry.row_bytes} is not in 8..{MAX_ROW_BYTES}", field=f"{path}.row_bytes"
        )
