"""Programs: where edits hold, what their JSON means, which of them are admitted, whose KV blocks they share."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_server.admission import check, check_scopes, parse, wire
from steer_server.dictionary.edits import Ablate, Add, AddRelative, Clamp, Limit, Patch
from steer_server.dictionary.site import Site
from steer_server.errors import (
    ConflictingEdits,
    DictionaryMismatch,
    DictionaryNotFound,
    InvalidRequest,
    SteerError,
    UnknownFeature,
)
from steer_server.program import (
    EVERYWHERE,
    Condition,
    FeatureEdit,
    Oversize,
    Program,
    ReadOut,
    Scope,
)
from steer_server.program_json import from_json, to_json
from steer_server.vllm_plugin.sentinel import sentinel
from tests.unit.serving import NAME, NEVER_FIRED, small_dictionary
from tests.unit.strategies import edits, numbers

DICTIONARIES = {NAME: small_dictionary(), "elsewhere": sentinel(Site("mlp_out", 0), 8)}
STORED = DICTIONARIES[NAME]
LENGTH = 6
positions = st.integers(-LENGTH, 12)


@st.composite
def scopes(draw: st.DrawFn) -> Scope:
    some = st.frozensets(positions, max_size=3)
    tokens = st.frozensets(st.integers(0, 3), max_size=2)
    windows = st.lists(st.tuples(positions, st.one_of(st.none(), positions)), max_size=4)
    held = draw(st.booleans()), draw(st.booleans())
    return Scope(*held, draw(some), tuple(draw(windows)), draw(tokens), draw(some), draw(tokens))


def by_definition(scope: Scope, position: int, token: int) -> bool:
    """Position by position, from the docstring."""

    def absolute(number: int) -> int:
        return number if number >= 0 else LENGTH + number

    phase = scope.prompt if position < LENGTH else scope.generated
    listed = position in map(absolute, scope.positions) or any(
        absolute(a) <= position and (b is None or position < absolute(b)) for a, b in scope.windows
    )
    everywhere = not scope.positions and not scope.windows
    excluded = position in map(absolute, scope.exclude_positions)
    named = not scope.token_ids or token in scope.token_ids
    unnamed = token not in scope.exclude_token_ids
    return phase and (everywhere or listed) and not excluded and named and unnamed


@given(scopes(), st.integers(0, 10), st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_a_scope_holds_where_its_parts_say(scope: Scope, start: int, tokens: list[int]) -> None:
    entry = FeatureEdit(NAME, Ablate(1), scope).resolve(LENGTH)
    runs = list(entry.where.runs(start, start + 5, LENGTH, tokens))

    held = [position for first, last in runs for position in range(first, last)]
    assert held == [
        start + i for i, token in enumerate(tokens) if by_definition(scope, start + i, token)
    ]


@given(scopes())
def test_between_edges_a_scope_does_not_change_with_the_position(scope: Scope) -> None:
    where = FeatureEdit(NAME, Ablate(1), scope).resolve(LENGTH).where
    held = [where.holds(position, LENGTH, token=1) for position in range(30)]

    changes = set((np.flatnonzero(np.diff(held)) + 1).tolist())
    assert changes <= where.edges | {LENGTH}


@given(scopes())
def test_it_may_hold_somewhere_if_some_token_would_let_it(scope: Scope) -> None:
    where = FeatureEdit(NAME, Ablate(1), scope).resolve(LENGTH).where
    # Scopes name tokens up to 3: 4 is in no list of excluded ones.
    tokens = scope.token_ids - scope.exclude_token_ids or {4}
    held = [where.holds(p, LENGTH, token) for p in range(9) for token in tokens]

    assert any(held) <= where.holds_somewhere(9, LENGTH)
    if not scope.token_ids <= scope.exclude_token_ids or not scope.token_ids:
        assert any(held) == where.holds_somewhere(9, LENGTH)


SCOPES = [EVERYWHERE, Scope(), Scope(prompt=False)]


@given(chosen=st.lists(st.tuples(st.sampled_from(SCOPES), st.booleans()), max_size=8))
def test_each_edit_is_in_the_group_of_where_it_runs(chosen: list[tuple[Scope, bool]]) -> None:
    entries = [
        FeatureEdit("d", Patch(index, ((2, 1.0),)) if patch else Ablate(index), scope)
        for index, (scope, patch) in enumerate(chosen)
    ]

    groups = Program(tuple(entries)).groups

    found = {index: where for where, indices in groups.items() for index in indices}
    assert found == {index: entry.where for index, entry in enumerate(entries)}
    assert all(indices == sorted(set(indices)) for indices in groups.values())


def test_a_position_before_the_prompt_is_refused_by_its_path() -> None:
    program = Program((FeatureEdit(NAME, Ablate(1), Scope(positions=frozenset({-7}))),))

    with pytest.raises(InvalidRequest, match="before a prompt of 6") as caught:
        program.resolve(LENGTH)
    assert caught.value.field == "edits[0].scope.positions"


@st.composite
def programs(draw: st.DrawFn) -> Program:
    features = draw(st.sets(st.integers(0, 5), max_size=4))
    conditions = st.builds(Condition, st.just(NAME), st.integers(0, 5), numbers)
    return Program(
        tuple(
            FeatureEdit(NAME, draw(edits(feature)), draw(scopes()), draw(st.none() | conditions))
            for feature in sorted(features)
        ),
        tuple(
            draw(
                st.lists(
                    st.sampled_from(
                        [
                            ReadOut(NAME, top_k=3, edited=True),
                            ReadOut(NAME, features=(2, 1), prompt=False),
                            ReadOut(NAME, above=0.25, row_bytes=64, complete=False),
                        ]
                    ),
                    max_size=3,
                )
            )
        ),
        draw(st.none() | st.floats(0.01, 10.0)),
        draw(st.sampled_from(Oversize)),
    )


@given(programs())
def test_a_program_survives_its_json(program: Program) -> None:
    assert from_json(json.loads(json.dumps(to_json(program)))) == program


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"clamp": {"value": 2}}, Clamp(3, 2.0)),
        (
            {"clamp": {"value": 2, "unit": "max_activation_multiple"}},
            Clamp(3, 2 * float(STORED.statistics.max[3])),
        ),
        (
            {"add": {"value": 2, "unit": "decoder_coefficient"}},
            Add(3, 2 * STORED.card.input_scale),
        ),
        ({"add": {"value": 0.5, "unit": "relative_norm"}}, AddRelative(3, 0.5)),
        ({"limit": {"high": 1.5}}, Limit(3, high=1.5)),
        ({"patch": {"values": [[2, 1.0], [-1, 0]]}}, Patch(3, ((2, 1.0), (-1, 0.0)))),
    ],
)
def test_units_are_resolved_to_activations(edit: dict[str, Any], expected: Any) -> None:
    content = {"edits": [{"dictionary": NAME, "feature": 3, **edit}]}

    program = parse(json.dumps(content), DICTIONARIES)

    assert program.edits[0].edit == expected


EDIT = {"dictionary": NAME, "feature": 3}
SCOPED = EDIT | {"ablate": {}}
PATCHED = {"dictionary": NAME, "patch": {"values": [[i, 1] for i in range(4096)]}}
READ = {"dictionary": NAME}
EXCLUDED = "edits[0].scope.exclude_positions"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"edit": []}, ""),
        ({"edits": {}}, "edits"),
        ({"edits": [EDIT]}, "edits[0]"),
        ({"edits": [EDIT | {"ablate": {}, "clamp": {"value": 1}}]}, "edits[0]"),
        ({"edits": [{"feature": 3, "ablate": {}}]}, "edits[0].dictionary"),
        ({"edits": [EDIT | {"feature": True, "ablate": {}}]}, "edits[0].feature"),
        ({"edits": [EDIT | {"ablate": {"value": 1}}]}, "edits[0].ablate"),
        ({"edits": [EDIT | {"clamp": {}}]}, "edits[0].clamp.value"),
        ({"edits": [EDIT | {"clamp": {"value": "1"}}]}, "edits[0].clamp.value"),
        ({"edits": [EDIT | {"clamp": {"value": 1e39}}]}, "edits[0].clamp.value"),
        ({"edits": [EDIT | {"clamp": {"value": 1, "unit": "x"}}]}, "edits[0].clamp.unit"),
        (
            {"edits": [EDIT | {"clamp": {"value": 1, "unit": "relative_norm"}}]},
            "edits[0].clamp.unit",
        ),
        (
            {
                "edits": [
                    {"dictionary": NAME, "feature": NEVER_FIRED}
                    | {"add": {"value": 1, "unit": "max_activation_multiple"}}
                ]
            },
            "edits[0].add.unit",
        ),
        ({"edits": [EDIT | {"limit": {"low": 2, "high": 1}}]}, "edits[0].limit"),
        ({"edits": [EDIT | {"patch": {"values": [[1]]}}]}, "edits[0].patch.values[0]"),
        ({"edits": [EDIT | {"patch": {"values": [[1, 1], [1, 2]]}}]}, "edits[0].patch.values[1]"),
        (
            {"edits": [EDIT | {"ablate": {}, "scope": {"windows": [[1]]}}]},
            "edits[0].scope.windows[0]",
        ),
        ({"edits": [EDIT | {"ablate": {}, "when": {"dictionary": NAME}}]}, "edits[0].when.feature"),
        ({"read_outs": [{"dictionary": NAME, "top_k": 1.5}]}, "read_outs[0].top_k"),
        ({"max_relative_size": "1"}, "max_relative_size"),
        ({"max_relative_size": 1e39}, "max_relative_size"),
        ({"max_relative_size": 1, "oversize": "cut"}, "oversize"),
        ({"max_relative_size": 1, "oversize": ["clamp"]}, "oversize"),
        ({"read_outs": [{"dictionary": NAME, "top_k": 1}] * 9}, "read_outs"),
        ("{", ""),
        ({"edits": [SCOPED | {"scope": {"exclude_positions": [0, 2**63]}}]}, EXCLUDED + "[1]"),
        ({"edits": [SCOPED | {"scope": {"windows": [[0, 2**31]]}}]}, "edits[0].scope.windows[0]"),
        ({"edits": [EDIT | {"patch": {"values": [[2**63, 1]]}}]}, "edits[0].patch.values[0]"),
        ({"edits": [EDIT | {"clamp": {"value": 10**400}}]}, "edits[0].clamp.value"),
        ({"edits": [SCOPED | {"scope": {"exclude_positions": [*range(1025)]}}]}, EXCLUDED),
        (
            {"edits": [SCOPED | {"scope": {"positions": [*range(1025)]}}]},
            "edits[0].scope.positions",
        ),
        (
            {"edits": [SCOPED | {"scope": {"token_ids": [*range(1025)]}}]},
            "edits[0].scope.token_ids",
        ),
        (
            {"edits": [SCOPED | {"scope": {"exclude_token_ids": [*range(1025)]}}]},
            "edits[0].scope.exclude_token_ids",
        ),
        (
            {"edits": [SCOPED | {"scope": {"windows": [[i, i + 1] for i in range(65)]}}]},
            "edits[0].scope.windows",
        ),
        (
            {"edits": [EDIT | {"patch": {"values": [[i, 1] for i in range(4097)]}}]},
            "edits[0].patch.values",
        ),
        ({"edits": [SCOPED | {"scope": {"positions": [i]}} for i in range(1, 66)]}, "edits"),
        ({"edits": [PATCHED | {"feature": i} for i in range(65)]}, "edits"),
        (
            {"read_outs": [READ | {"above": 0, "row_bytes": 32_768}, READ | {"top_k": 1}]},
            "read_outs",
        ),
    ],
)
def test_json_that_makes_no_sense_is_refused_by_its_path(content: Any, field: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)

    with pytest.raises(SteerError) as caught:
        parse(text, DICTIONARIES)
    assert caught.value.field == field


def test_a_clients_scopes_may_list_as_much_as_is_said() -> None:
    scopes = [{"positions": [*range(i, i + 1024)], "windows": [[1, 2]] * 64} for i in range(64)]
    edits = [{"dictionary": NAME, "feature": i % 32, "ablate": {}} for i in range(64)]

    program = parse(
        {"edits": [*(e | {"scope": s} for e, s in zip(edits, scopes, strict=True))]}, DICTIONARIES
    )
    parse({"edits": [PATCHED | {"feature": i} for i in range(64)]}, DICTIONARIES)
    reads = [READ | {"above": 0, "row_bytes": 32_760}, READ | {"top_k": 1}]
    parse({"read_outs": reads}, DICTIONARIES)

    assert len(program.edits) == 64


def test_a_patch_that_names_a_position_from_both_ends_is_refused() -> None:
    program = Program((FeatureEdit(NAME, Patch(1, ((4, 2.0), (-1, 1.0)))),))

    with pytest.raises(InvalidRequest) as caught:
        program.resolve(5)
    assert caught.value.field == "edits[0].patch.positions"
    assert program.resolve(6).edits[0].edit == Patch(1, ((4, 2.0), (5, 1.0)))


def test_read_outs_of_watched_features_do_not_count_against_the_clients() -> None:
    program = Program(read_outs=(ReadOut(NAME, top_k=1),) * 8 + (ReadOut(NAME, features=(1,)),))

    check(parse(program, DICTIONARIES), DICTIONARIES)

    assert len(program.read_outs) == 9


@pytest.mark.parametrize(
    ("program", "error", "field"),
    [
        (Program((FeatureEdit("x", Ablate(1)),)), DictionaryNotFound, "edits[0].dictionary"),
        (Program((FeatureEdit(NAME, Ablate(99)),)), UnknownFeature, "edits[0].feature"),
        (Program((FeatureEdit(NAME, Ablate(1)),) * 2), ConflictingEdits, "edits[1].feature"),
        (Program((FeatureEdit(NAME, Ablate(1)),) * 1025), InvalidRequest, "edits"),
        (
            Program((FeatureEdit(NAME, Ablate(1), when=Condition("elsewhere", 0)),)),
            DictionaryMismatch,
            "edits[0].when.dictionary",
        ),
        (Program((), (ReadOut(NAME),)), InvalidRequest, "read_outs[0]"),
        (Program((), (ReadOut(NAME, top_k=129),)), InvalidRequest, "read_outs[0].top_k"),
        (Program((), (ReadOut(NAME, features=(1, 1)),)), InvalidRequest, "read_outs[0].features"),
        (Program((), (ReadOut(NAME, above=-1.0),)), InvalidRequest, "read_outs[0].above"),
        (
            Program((), (ReadOut(NAME, above=0.0, row_bytes=4),)),
            InvalidRequest,
            "read_outs[0].row_bytes",
        ),
        (Program(max_relative_size=0.0), InvalidRequest, "max_relative_size"),
        (Program(max_relative_size=1e4), InvalidRequest, "max_relative_size"),
        (Program(oversize=Oversize.CLAMP), InvalidRequest, "oversize"),
    ],
)
def test_programs_that_no_engine_could_run_are_refused(
    program: Program, error: type[SteerError], field: str
) -> None:
    with pytest.raises(error) as caught:
        check(program, DICTIONARIES)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("scope", "holds"),
    [
        (Scope(), True),
        (Scope(positions=frozenset({0})), False),
        (Scope(prompt=False), True),
        (Scope(prompt=False, windows=((2, 6),)), False),
        (Scope(windows=((30, None),)), False),
        (Scope(token_ids=frozenset({7})), True),
    ],
)
def test_a_scope_that_selects_nothing_is_refused(scope: Scope, holds: bool) -> None:
    program = Program((FeatureEdit(NAME, Ablate(1), scope),))

    if holds:
        check_scopes(program, LENGTH, max_tokens=4)
        assert wire(program, DICTIONARIES, [STORED.card.site], 1)["features"] == [(0, NAME, 1)]
    else:
        with pytest.raises(InvalidRequest, match="holds at none"):
            check_scopes(program, LENGTH, max_tokens=4)


def test_a_program_with_more_features_than_slots_is_refused() -> None:
    program = Program((FeatureEdit(NAME, Ablate(1), when=Condition(NAME, 2)),))
    sites = [STORED.card.site]

    assert wire(program, DICTIONARIES, sites, 2)["features"] == [(0, NAME, 1), (0, NAME, 2)]
    with pytest.raises(InvalidRequest, match="need 2 slots"):
        wire(program, DICTIONARIES, sites, 1)
    # Each site has slots of its own.
    apart = Program((FeatureEdit(NAME, Ablate(1)), FeatureEdit("elsewhere", Ablate(0))))
    both = [*sites, DICTIONARIES["elsewhere"].card.site]
    assert len(wire(apart, DICTIONARIES, both, 1)["features"]) == 2


def salt(
    program: Program, hashes: dict[str, str], prompt_length: int, nonce: str = ""
) -> str | None:
    return program.cache_salt(program.digest(hashes), prompt_length, nonce)


def test_equal_programs_share_a_salt_and_unequal_ones_do_not() -> None:
    hashes = {"a": "1", "b": "2"}
    one, two = FeatureEdit("a", Ablate(1)), FeatureEdit("b", Add(2, 1.0))
    tokens = Scope(token_ids=frozenset({5}))

    assert salt(Program(), hashes, 9) is None
    assert salt(Program((), (ReadOut("a", top_k=1),)), hashes, 9) is None
    salts = [
        salt(Program(chosen), hashes, 9)
        for chosen in (
            (one,),
            (two,),
            (one, two),
            (FeatureEdit("a", Ablate(2)),),
            (FeatureEdit("b", Add(2, 1.5)),),
            (FeatureEdit("a", Ablate(1), Scope(prompt=False)),),
            (FeatureEdit("a", Ablate(1), Scope(windows=((1, 3),))),),
            (FeatureEdit("a", Ablate(1), tokens),),
            (FeatureEdit("a", Ablate(1), when=Condition("a", 1)),),
            (FeatureEdit("a", Ablate(1), when=Condition("b", 1)),),
        )
    ]
    assert len(set(salts)) == len(salts)
    assert salt(Program((two, one)), hashes, 9) == salt(Program((one, two)), hashes, 9)
    assert salt(Program(), hashes, 9, "n") != salt(Program(), hashes, 9, "m")
    assert salt(Program((one,)), {"a": "other"}, 9) != salts[0]


def test_a_programs_digest_does_not_depend_on_what_was_looked_up_in_it() -> None:
    edit = Patch(1, ((2, 1.0), (3, 4.0)))
    program = Program((FeatureEdit("a", edit),))
    before = program.digest({"a": "1"})

    assert edit.by_position == {2: 1.0, 3: 4.0}
    assert program.digest({"a": "1"}) == before
    assert program == Program((FeatureEdit("a", Patch(1, edit.values)),))


def test_a_limit_that_is_kept_has_a_salt_of_its_own_and_one_that_only_counts_has_not() -> None:
    edits = (FeatureEdit("a", Ablate(1)),)
    salts = [
        salt(Program(edits, (), *limit), {"a": "1"}, 9)
        for limit in (
            (None,),
            (0.5, Oversize.REJECT),
            (0.5, Oversize.CLAMP),
            (0.25, Oversize.CLAMP),
        )
    ]

    assert len(set(salts)) == len(salts)
    assert salt(Program(edits, (), 0.5, Oversize.WARN), {"a": "1"}, 9) == salts[0]


def test_the_prompt_s_length_counts_where_phases_do() -> None:
    """What one turn generated is a part of the next one's prompt."""
    hashes = {"a": "1"}
    alike = Program((FeatureEdit("a", Ablate(1)),))
    apart = Program((FeatureEdit("a", Ablate(1), Scope(prompt=False)),))

    assert salt(alike, hashes, 9) == salt(alike, hashes, 20)
    assert salt(apart, hashes, 9) == salt(apart, hashes, 9)
    assert salt(apart, hashes, 9) != salt(apart, hashes, 20)
