"""The worker's runtime without a model: random batches, any packing, any chunks, any interruption."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_server.dictionary import files
from steer_server.dictionary.card import Card, Model
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.edits import Ablate, Add, AddRelative, Edit, edit_delta
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.site import Site
from steer_server.errors import (
    CorruptDictionary,
    DictionaryMismatch,
    EditNotApplied,
    EditTooLarge,
)
from steer_server.program import FeatureEdit, Program, ReadOut, Scope
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.runtime import Runtime
from steer_server.vllm_plugin.wire import StepResult, program_to_wire
from tests.unit.strategies import D_MODEL, N_FEATURES, edit_sets, normal, seeds

SITES = (Site("resid_post", 1), Site("resid_post", 3))


@dataclass
class Saved:
    folder: Path
    dictionary: Dictionary
    arithmetic: str


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Two dictionaries at the first site, one at the second."""
    found = {}
    for seed, (name, site) in enumerate({"a": SITES[0], "b": SITES[0], "c": SITES[1]}.items()):
        rows = torch.nn.functional.normalize(normal(seed, N_FEATURES, D_MODEL).float(), dim=1)
        dictionary = Dictionary.tied(rows, normal(seed + 9, N_FEATURES).float() * 0.1)
        card = Card(
            name,
            Model("m", "", ""),
            site,
            D_MODEL,
            N_FEATURES,
            "tied_relu",
            "relu",
            1.0,
            False,
            "float32",
            files.self_test(dictionary),
        )
        folder = tmp_path_factory.mktemp("runtime") / name
        card = files.save(folder, card, dictionary, FeatureStatistics.zeros(N_FEATURES))
        found[name] = Saved(folder, dictionary, card.arithmetic)
    return found


@pytest.fixture
def runtime(saved: dict[str, Saved]) -> Runtime:
    runtime = Runtime(SITES, torch.device("cpu"))
    for name, entry in saved.items():
        runtime.load(name, entry.folder, entry.arithmetic)
    return runtime


class Batch:
    """Feeds the runtime the steps of some requests, as vLLM would, and keeps what came out."""

    def __init__(self, runtime: Runtime, seed: int) -> None:
        self.runtime, self.seed = runtime, seed
        self.accounts: dict[str, Account] = {}
        self.results: dict[str, list[StepResult]] = {}
        self.edited: dict[tuple[str, int, int], Tensor] = {}

    def admit(self, name: str, prompt_length: int, program: Program) -> None:
        self.accounts[name] = Account(prompt_length, [program])
        self.results[name] = []
        content = program_to_wire(program) | {"name": f"client-{name}"}
        self.runtime.admit(name, prompt_length, content)

    def update(self, name: str, program: Program) -> None:
        self.accounts[name].add_revision(program)
        assert self.runtime.update(f"client-{name}", program_to_wire(program))

    def x(self, name: str, site: int, position: int) -> Tensor:
        """Each row of each request has its own vector, whatever it is packed with."""
        return normal(hash((self.seed, name, site, position)) % 2**31, D_MODEL).float()

    def step(self, rows: Sequence[tuple[str, int, int]], padding: int = 0) -> None:
        """One forward pass over (request, first position, count)."""
        self.runtime.begin_step(*zip(*((n, c, s) for n, s, c in rows), strict=True))
        where = [(n, p) for n, s, c in rows for p in range(s, s + c)]
        for site in range(len(SITES)):
            x = torch.stack([self.x(n, site, p) for n, p in where])
            residual = torch.full_like(x, 0.25)
            pad = torch.full((padding, D_MODEL), 7.0)
            hidden = torch.cat([x - residual, pad])
            self.runtime.at_site(hidden, torch.cat([residual, pad]), site)
            assert torch.equal(hidden[len(where) :], pad)
            for row, (name, position) in enumerate(where):
                self.edited[name, site, position] = hidden[row] + 0.25
        for name, content in self.runtime.end_step().items():
            self.accounts[name].receive([content])
            self.results[name] += self.accounts[name].take()


def delta(saved: dict[str, Saved], x: Tensor, edits: Sequence[tuple[str, Edit]]) -> Tensor:
    total = torch.zeros_like(x)
    for name in saved:
        mine = [edit for owner, edit in edits if owner == name]
        total += edit_delta(saved[name].dictionary, x[None], mine)[0]
    return total


def edits_of(program: Program, site: int, position: int, prompt: int) -> list[tuple[str, Edit]]:
    names = ("a", "b") if site == 0 else ("c",)
    return [
        (entry.dictionary, entry.edit)
        for entry in program.edits
        if entry.dictionary in names and entry.scope.holds(position, prompt)
    ]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    scope = Scope(
        draw(st.booleans()), draw(st.booleans()), frozenset(draw(st.sets(st.integers(0, 9))))
    )
    return Program(
        tuple(
            FeatureEdit(name, edit, scope)
            for name in draw(st.sets(st.sampled_from("abc")))
            for edit in draw(edit_sets())
        )
    )


@settings(max_examples=60)
@given(asked=st.lists(programs(), min_size=1, max_size=4), chunk=st.integers(1, 5), seed=seeds)
def test_each_row_gets_its_own_requests_edits_in_any_packing(
    saved: dict[str, Saved], asked: list[Program], chunk: int, seed: int
) -> None:
    runtime = Runtime(SITES, torch.device("cpu"))
    for name, entry in saved.items():
        runtime.load(name, entry.folder, entry.arithmetic)
    batch = Batch(runtime, seed)
    prompt, total = 6, 10
    for i, program in enumerate(asked):
        batch.admit(f"r{i}", prompt, program)
    done = {f"r{i}": 0 for i in range(len(asked))} | {"plain": 0}
    order = list(done)
    while any(count < total for count in done.values()):
        order = order[1:] + order[:1]
        rows = [(n, done[n], min(chunk + i, total - done[n])) for i, n in enumerate(order)]
        rows = [row for row in rows if row[2] > 0]
        batch.step(rows, padding=chunk % 3)
        for name, _, count in rows:
            done[name] += count

    for (name, site, position), edited in batch.edited.items():
        x = batch.x(name, site, position)
        program = Program() if name == "plain" else asked[int(name[1:])]
        edits = edits_of(program, site, position, prompt)
        if not edits:
            assert torch.equal(edited, (x - 0.25) + 0.25)
        torch.testing.assert_close(edited, x + delta(saved, x, edits), atol=1e-4, rtol=1e-4)
    for i, program in enumerate(asked):
        reports = batch.accounts[f"r{i}"].close(total - prompt + 1)
        for report, entry in zip(reports, program.edits, strict=True):
            held = [entry.scope.holds(position, prompt) for position in range(total)]
            assert report.tokens_in_scope == sum(held)


def test_a_recompute_replays_the_revision_of_each_position_and_reports_nothing_twice(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 1)
    first = Program((FeatureEdit("a", Add(1, 2.0)),), (ReadOut("a", top_k=2),))
    second = Program((FeatureEdit("a", Add(2, -3.0)),), first.read_outs)
    batch.admit("r", 4, first)
    batch.step([("r", 0, 4)])
    batch.step([("r", 4, 1)])
    batch.update("r", second)
    batch.step([("r", 5, 1)])
    once = dict(batch.edited)
    third = Program((FeatureEdit("a", AddRelative(3, 0.5)),), first.read_outs)
    batch.update("r", third)
    batch.step([("r", 0, 3)])
    batch.step([("r", 3, 4)])

    for key, edited in once.items():
        assert torch.equal(batch.edited[key], edited)
    x = batch.x("r", 0, 6)
    expected = x + delta(saved, x, [("a", AddRelative(3, 0.5))])
    torch.testing.assert_close(batch.edited["r", 0, 6], expected, atol=1e-5, rtol=1e-5)
    applied = [entry for result in batch.results["r"] for entry in result.applied]
    assert applied == [(1, 5), (2, 6)]
    positions = [p for r in batch.results["r"] for rows in r.rows for p in rows.positions.tolist()]
    assert positions == list(range(7))
    assert [r.tokens_in_scope for r in batch.accounts["r"].close(4)] == [4, 1, 1]


def test_read_outs_are_of_the_unedited_vector(runtime: Runtime, saved: dict[str, Saved]) -> None:
    batch = Batch(runtime, 2)
    features = (3, 1, 5)
    program = Program(
        (FeatureEdit("a", AddRelative(0, 2.0)),),
        (
            ReadOut("a", top_k=2),
            ReadOut("b", features=features, prompt=False),
            ReadOut("c", top_k=N_FEATURES, generated=False),
        ),
    )
    batch.admit("r", 3, program)
    batch.admit("other", 2, Program((), (ReadOut("a", top_k=4),)))
    batch.step([("other", 0, 2), ("plain", 0, 2), ("r", 0, 3)])
    batch.step([("r", 3, 1), ("other", 2, 1)])

    rows = {
        (r.read_out, int(p)): (r, i)
        for s in batch.results["r"]
        for r in s.rows
        for i, p in enumerate(r.positions)
    }
    assert sorted(rows) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (2, 0), (2, 1), (2, 2)]
    for (read_out, position), (entry, i) in rows.items():
        name = "abc"[read_out]
        f = saved[name].dictionary.encode(batch.x("r", 1 if name == "c" else 0, position))
        part = slice(entry.row_splits[i], entry.row_splits[i + 1])
        got = dict(zip(entry.features[part].tolist(), entry.values[part].tolist(), strict=True))
        index = list(features) if read_out == 1 else f.topk((2, 0, N_FEATURES)[read_out]).indices
        want = {int(j): float(f[j]) for j in index if f[j] != 0}
        assert list(got) == list(want)
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
        if entry.active is not None:
            assert entry.active[i] == np.count_nonzero(f)


def test_an_op_that_does_not_run_is_an_error_and_not_silence(runtime: Runtime) -> None:
    account = Account(2, [Program()])
    program = Program((FeatureEdit("a", Ablate(1)),), ())
    runtime.admit("r", 2, program_to_wire(program) | {"name": "r"})
    runtime.begin_step(["r"], [2], [0])
    account.receive([runtime.end_step()["r"]])

    with pytest.raises(EditNotApplied, match="did not run"):
        account.take()


def test_rows_missing_from_the_worker_fail_the_proof() -> None:
    account = Account(5, [Program((FeatureEdit("a", Ablate(1)),), ())])

    with pytest.raises(EditNotApplied, match="ran on 0 tokens, its scope holds 7"):
        account.close(generated=4)


def test_rows_from_the_prefix_cache_are_no_gap_in_the_proof(runtime: Runtime) -> None:
    batch = Batch(runtime, 4)
    batch.admit("r", 8, Program((FeatureEdit("a", Add(1, 1.0)),), ()))
    batch.step([("r", 2, 2)])
    # Preempted, and resumed behind what another request has cached since.
    batch.step([("r", 6, 2)])

    (report,) = batch.accounts["r"].close(1)
    assert report.tokens_in_scope == 4


def test_edits_too_large_for_the_model_are_left_out_and_fail_their_request(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 5)
    batch.admit("r", 2, Program((FeatureEdit("a", AddRelative(1, 3e4)),), ()))
    batch.admit("nan", 2, Program(tuple(FeatureEdit("a", Add(i, 3e38)) for i in range(4)), ()))
    batch.admit("fine", 2, Program((FeatureEdit("a", AddRelative(1, 9e3)),), ()))
    for name in ("r", "nan"):
        batch.runtime.begin_step([name, "fine"], [2, 1], [0, 1])
        x = torch.stack([batch.x(name, 0, 0), batch.x(name, 0, 1), batch.x("fine", 0, 1)])
        hidden = x.clone()
        batch.runtime.at_site(hidden, None, 0)
        account = batch.accounts[name]
        account.receive([batch.runtime.end_step()[name]])

        assert torch.equal(hidden[:2], x[:2])
        assert hidden[2].isfinite().all()
        assert not torch.equal(hidden[2], x[2])
        with pytest.raises(EditTooLarge, match="smaller strengths"):
            account.take()


def test_two_read_outs_of_one_request_do_not_shift_into_a_neighbour(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 6)
    twice = (ReadOut("a", top_k=1), ReadOut("a", top_k=1), ReadOut("a", features=(2,)))
    batch.admit("one", 5, Program((), twice))
    batch.admit("two", 5, Program((), twice[:1]))
    batch.step([("one", 1, 1), ("plain", 1, 1), ("two", 1, 1)])

    f = saved["a"].dictionary.encode(batch.x("one", 0, 1))
    first, second, third = batch.results["one"][0].rows
    assert first.features.tolist() == second.features.tolist() == [int(f.argmax())]
    assert third.values.tolist() == pytest.approx([float(f[2])] if f[2] > 0 else [])


def test_ended_requests_are_forgotten(runtime: Runtime) -> None:
    batch = Batch(runtime, 3)
    batch.admit("r", 1, Program((FeatureEdit("a", Ablate(1)),), ()))
    runtime.forget(["r", "never seen"])

    assert not runtime.update("client-r", program_to_wire(Program()))
    runtime.begin_step(["r"], [1], [0])
    assert runtime.end_step() == {}


def test_a_dictionary_of_an_unserved_site_or_with_other_bytes_is_refused(
    saved: dict[str, Saved],
) -> None:
    runtime = Runtime(SITES[:1], torch.device("cpu"))

    with pytest.raises(DictionaryMismatch, match=r"resid_post\.3"):
        runtime.load("c", saved["c"].folder, saved["c"].arithmetic)
    with pytest.raises(CorruptDictionary, match="changed"):
        runtime.load("a", saved["a"].folder, "0" * 64)


def test_equal_programs_share_a_salt_and_unequal_ones_do_not() -> None:
    hashes = {"a": "1", "b": "2"}
    one, two = FeatureEdit("a", Ablate(1)), FeatureEdit("b", Add(2, 1.0))

    assert Program().cache_salt(hashes) is None
    assert Program((), (ReadOut("a", top_k=1),)).cache_salt(hashes) is None
    salts = [
        Program(edits).cache_salt(hashes)
        for edits in (
            (one,),
            (two,),
            (one, two),
            (FeatureEdit("a", Ablate(2)),),
            (FeatureEdit("b", Add(2, 1.5)),),
            (FeatureEdit("a", Ablate(1), Scope(prompt=False)),),
        )
    ]
    assert len(set(salts)) == len(salts)
    assert Program((two, one)).cache_salt(hashes) == Program((one, two)).cache_salt(hashes)
    assert Program().cache_salt(hashes, "n") != Program().cache_salt(hashes, "m")
    assert Program((one,)).cache_salt({"a": "other"}) != salts[0]
