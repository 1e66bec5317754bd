"""The worker's runtime without a model: random batches, any packing, any chunks, any interruption.

With TRITON_INTERPRET=1 the same tests run through the Triton kernels instead of plain torch, and with
STEER_TEST_PRETENDED_GPU=1 on a GPU that is not there.
"""

import gc
import json
import math
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from steer_server.dictionary.edits import Ablate, Add, AddRelative, Clamp, Patch, Scale, edit_delta
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.site import Site
from steer_server.errors import (
    CorruptDictionary,
    DictionaryMismatch,
    EditNotApplied,
    EditTooLarge,
)
from steer_server.generation import EditReport
from steer_server.program import Condition, FeatureEdit, Oversize, Program, ReadOut, Scope
from steer_server.program_json import to_json
from steer_server.vllm_plugin import encode_kernel, readout
from steer_server.vllm_plugin import residents as residents_module
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.bank import Bank, Slots
from steer_server.vllm_plugin.ledger import Ledger
from steer_server.vllm_plugin.report import StepReport, StepResult
from steer_server.vllm_plugin.residents import Resident, Residents
from steer_server.vllm_plugin.runtime import Runtime
from tests.unit import pretended_gpu
from tests.unit.pretended_gpu import PretendedGpu
from tests.unit.strategies import (
    ARCHITECTURES,
    D_MODEL,
    N_FEATURES,
    dictionary,
    edit_sets,
    normal,
    numbers,
    seeds,
)

SITES = (Site("resid_post", 1), Site("resid_post", 3))
PROMPT, VOCABULARY = 6, 5
KERNELS = bool(os.environ.get("TRITON_INTERPRET"))
GPU = PretendedGpu() if os.environ.get("STEER_TEST_PRETENDED_GPU") else None
NAMES = "trjkgi"
"""Of a dictionary of each of ARCHITECTURES: tied, relu, jump_relu, top_k, gated, identity."""
SERVED = NAMES.replace("k", "") if KERNELS else NAMES


@dataclass
class Saved:
    folder: Path
    dictionary: Dictionary
    arithmetic: str
    site: int


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Dictionaries of every architecture: some share a site, and some are alone."""
    found = {}
    for seed, architecture in enumerate(ARCHITECTURES):
        name, number = NAMES[seed], seed % 2
        made = dictionary(seed, architecture).to(torch.float32)
        card = Card.of(
            made,
            name=name,
            model=Model("m", "", ""),
            site=SITES[number],
            architecture=architecture,
        )
        folder = tmp_path_factory.mktemp("runtime") / name
        card = files.save(folder, card, made, FeatureStatistics.zeros(N_FEATURES))
        found[name] = Saved(folder, files.load(folder).dictionary, card.arithmetic, number)
    return found


def placed(tensor: Tensor) -> Tensor:
    return pretended_gpu.place(tensor) if GPU else tensor


def new_runtime(saved: dict[str, Saved]) -> Runtime:
    rows = 64 if KERNELS else 0
    device = pretended_gpu.DEVICE if GPU else torch.device("cpu")
    runtime = Runtime(SITES, [0, 1], D_MODEL, 64, device, kernel_rows=rows)
    for name in SERVED:
        load(runtime, name, saved[name])
    return runtime


def load(runtime: Runtime, name: str, dictionary: Saved) -> None:
    waited = len(GPU.waits) if GPU else 0
    runtime.residents.load(name, dictionary.folder, dictionary.arithmetic)
    if GPU:
        # The copies of its tables.
        assert GPU.waits[waited:] == ["to"] * 4
        del GPU.waits[waited:]


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    with pretended_gpu.at_work(GPU) if GPU else nullcontext():
        yield


@pytest.fixture
def runtime(saved: dict[str, Saved]) -> Runtime:
    if GPU:
        # Of a test that failed.
        GPU.waits.clear()
    return new_runtime(saved)


class Batch:
    """Feeds the runtime the steps of some requests, as vLLM would, and keeps what came out."""

    def __init__(self, runtime: Runtime, seed: int) -> None:
        self.runtime, self.seed = runtime, seed
        self.accounts: dict[str, Account] = {}
        self.ledger = Ledger(lambda name, tally: self.accounts[name].enter(tally))
        self.results: dict[str, list[StepResult]] = {}
        self.edited: dict[tuple[str, int, int], Tensor] = {}

    def admit(self, name: str, prompt_length: int, program: Program) -> None:
        tokens = [self.token(name, position) for position in range(prompt_length)]
        self.accounts[name] = Account(tokens, [program], settle=self.ledger.settle)
        self.results[name] = []
        content = {"program": json.dumps(to_json(program)), "prompt_length": prompt_length}
        self.runtime.admit(name, content)

    def update(self, name: str, program: Program, first: int = 0) -> None:
        self.accounts[name].add_revision(program)
        self.runtime.update(name, json.dumps(to_json(program)), first)

    def token(self, name: str, position: int) -> int:
        return hash((self.seed, name, position)) % VOCABULARY

    def x(self, name: str, site: int, position: int) -> Tensor:
        """Each row of each request has its own vector, whatever it is packed with."""
        return normal(hash((self.seed, name, site, position)) % 2**31, D_MODEL).float()

    def begin(self, rows: Sequence[tuple[str, int, int]]) -> None:
        if GPU and not KERNELS:
            GPU.waits.clear()
        names, starts, counts = zip(*rows, strict=True)

        def tokens_of(index: int):
            return lambda a, b: [self.token(names[index], position) for position in range(a, b)]

        self.runtime.begin_step(list(names), np.array(counts), np.array(starts), tokens_of)

    def end(self) -> None:
        step = self.runtime.end_step()
        # Without the kernels a new layout is put on the device piece by piece.
        if GPU and (KERNELS or (step is not None and not step.first)):
            assert not GPU.waits
        if step is not None:
            report = self.said = StepReport.from_wire(self.runtime.report(step))
            self.ledger.enter(report)
            report.deliver(lambda name: self.accounts[name].result)

    def step(self, rows: Sequence[tuple[str, int, int]], padding: int = 0) -> None:
        """One forward pass over (request, first position, count)."""
        self.begin(rows)
        where = [(n, p) for n, s, c in rows for p in range(s, s + c)]
        for site in range(len(SITES)):
            x = torch.stack([self.x(n, site, p) for n, p in where])
            residual = torch.full_like(x, 0.25)
            pad = torch.full((padding, D_MODEL), 7.0)
            hidden = torch.cat([x - residual, pad])
            self.runtime.at_site(placed(hidden), placed(torch.cat([residual, pad])), site)
            assert torch.equal(hidden[len(where) :], pad)
            for row, (name, position) in enumerate(where):
                self.edited[name, site, position] = hidden[row] + 0.25
        self.end()
        for name, account in self.accounts.items():
            if (result := account.take()) is not None:
                self.results[name].append(result)

    def close(self, name: str, rows: int) -> tuple[EditReport, ...]:
        """The reports of a request that computed `rows` rows."""
        account = self.accounts[name]
        generated = range(account.prompt_length, rows + 1)
        account.token_ids = [self.token(name, position) for position in generated]
        return account.close()


def change_at(
    saved: dict[str, Saved], program: Program, batch: Batch, name: str, site: int, position: int
) -> Tensor:
    """What the program adds to the row, if it has no limit: every edit by itself, by definition."""
    x = batch.x(name, site, position)[None]
    total = torch.zeros(D_MODEL)
    for entry in program.edits:
        owner = saved[entry.dictionary]
        token = batch.token(name, position)
        if owner.site != site or not entry.where.holds(position, PROMPT, token):
            continue
        when = entry.when
        if when is not None:
            f = saved[when.dictionary].dictionary.encode_features(x, [when.feature])
            if not f[0, 0] > when.above:
                continue
        total += edit_delta(owner.dictionary, x, [entry.edit], [position])[0]
    return total


def limit(program: Program, x: Tensor, change: Tensor) -> tuple[Tensor, bool]:
    """What is left of `change` under the program's limit, and whether it is past it."""
    most = (program.max_relative_size or math.inf) * x.norm()
    over = bool(change.norm() > most)
    if over and program.oversize is Oversize.CLAMP:
        change = change * (most / change.norm())
    return change, over


@st.composite
def scopes(draw: st.DrawFn) -> Scope:
    some_positions = st.frozensets(st.integers(0, 9), max_size=3)
    some_tokens = st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2)
    window = st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(3, 9)))
    return Scope(
        draw(st.booleans()),
        draw(st.booleans()),
        draw(some_positions),
        tuple(draw(st.lists(window, max_size=2))),
        draw(st.one_of(st.just(frozenset()), some_tokens)),
        draw(some_positions),
        draw(st.one_of(st.just(frozenset()), some_tokens)),
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    shared = draw(scopes())
    found = []
    for name in draw(st.sets(st.sampled_from(SERVED))):
        for edit in draw(edit_sets()):
            scope = draw(scopes()) if draw(st.integers(0, 3)) == 0 else shared
            when = None
            if draw(st.integers(0, 3)) == 0:
                when = Condition(name, draw(st.integers(0, N_FEATURES - 1)), draw(numbers))
            found.append(FeatureEdit(name, edit, scope, when))
    # No sum of edits is as long as these by chance.
    most = draw(st.sampled_from([None, 0.0371, 0.7713]))
    oversize = draw(st.sampled_from([Oversize.CLAMP, Oversize.WARN]))
    return Program(tuple(found), (), most, oversize)


@settings(max_examples=10 if KERNELS or GPU else 100)
@given(
    asked=st.lists(programs(), min_size=1, max_size=4),
    chunk=st.integers(1, 5),
    steady=st.booleans(),
    seed=seeds,
)
def test_each_row_gets_its_own_requests_edits_in_any_packing(
    saved: dict[str, Saved], asked: list[Program], chunk: int, steady: bool, seed: int
) -> None:
    batch = Batch(new_runtime(saved), seed)
    total = 10
    for i, program in enumerate(asked):
        batch.admit(f"r{i}", PROMPT, program)
    done = {f"r{i}": 0 for i in range(len(asked))} | {"plain": 0}
    order = list(done)
    while any(count < total for count in done.values()):
        if not steady:
            order = order[1:] + order[:1]
        sizes = [chunk if steady else chunk + i for i in range(len(order))]
        rows = [(n, done[n], min(k, total - done[n])) for n, k in zip(order, sizes, strict=True)]
        rows = [row for row in rows if row[2] > 0]
        batch.step(rows, padding=chunk % 3)
        for name, _, count in rows:
            done[name] += count

    limited = dict.fromkeys(done, 0)
    for (name, site, position), edited in batch.edited.items():
        x = batch.x(name, site, position)
        program = Program() if name == "plain" else asked[int(name[1:])]
        change = change_at(saved, program, batch, name, site, position)
        change, over = limit(program, x, change)
        limited[name] += over
        if not change.any():
            assert torch.equal(edited, (x - 0.25) + 0.25)
        torch.testing.assert_close(edited, x + change, atol=1e-4, rtol=1e-4)
    for i, program in enumerate(asked):
        reports = batch.close(f"r{i}", total)
        tokens = [batch.token(f"r{i}", position) for position in range(total)]
        for report, entry in zip(reports, program.edits, strict=True):
            runs = entry.where.runs(0, total, PROMPT, tokens)
            assert report.tokens_in_scope == sum(last - first for first, last in runs)
            alone, site = Program((entry,)), saved[entry.dictionary].site
            changed = [change_at(saved, alone, batch, f"r{i}", site, p).any() for p in range(total)]
            assert report.tokens_changed == sum(map(int, changed))
        assert batch.accounts[f"r{i}"].limited_tokens == limited[f"r{i}"]


def test_chunks_are_not_taken_for_more_of_the_same(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 9)
    program = Program((FeatureEdit("t", Add(1, 2.0)),))
    batch.admit("r", 40, program)
    for start, count in ((0, 4), (4, 4), (8, 4), (12, 2)):
        batch.step([("r", start, count)])

    for position in range(14):
        x, change = batch.x("r", 0, position), change_at(saved, program, batch, "r", 0, position)
        torch.testing.assert_close(batch.edited["r", 0, position], x + change)
    batch.ledger.settle()
    (total,) = batch.accounts["r"]._totals[0]
    assert total.rows == 13


def test_a_steady_batch_is_laid_out_once(runtime: Runtime, saved: dict[str, Saved]) -> None:
    batch = Batch(runtime, 8)
    scope = Scope(windows=((4, 9),))
    program = Program((FeatureEdit("r", Add(1, 2.0), scope),), (ReadOut("r", top_k=2),))
    batch.admit("one", 2, program)
    batch.admit("two", 2, Program((FeatureEdit("r", Ablate(3)),)))
    layouts = set()
    for position in range(2, 12):
        batch.step([("one", position, 1), ("plain", position, 1), ("two", position, 1)])
        layouts.add(id(runtime._layout))
        change = change_at(saved, program, batch, "one", 1, position)
        x = batch.x("one", 1, position)
        torch.testing.assert_close(batch.edited["one", 1, position], x + change)

    assert len(layouts) == 3
    positions = [
        p for r in batch.results["one"] for rows in r.rows for p in rows.positions.tolist()
    ]
    assert positions == list(range(2, 12))
    assert [report.tokens_in_scope for report in batch.close("one", 12)] == [5]


def test_equal_programs_are_one_and_their_edits_are_made_once(runtime: Runtime) -> None:
    batch = Batch(runtime, 3)
    program = Program((FeatureEdit("r", Add(1, 1.0)), FeatureEdit("t", Clamp(0, 2.0))))
    for name, asked in (("a", program), ("b", program), ("c", replace(program, edits=()))):
        batch.admit(name, PROMPT, asked)
    batch.step([("a", 0, 4), ("b", 0, 4)])

    states, layout = runtime._states, runtime._layout
    assert layout is not None
    assert states["a"].programs[0] is states["b"].programs[0]
    assert states["a"].programs[0] is not states["c"].programs[0]
    # Position 0 is in no default scope.
    assert [edits.lines.slot.shape[0] for edits in layout.edits.values()] == [1, 1]
    runtime.forget(["a"])
    batch.step([("b", 4, 1)])
    batch.close("b", 5)
    assert runtime.counts()["slots"] == 2
    runtime.forget(["b", "c"])
    assert runtime.counts()["slots"] == 0


def test_choices_of_edits_are_not_kept_without_end(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer_server.vllm_plugin.programs._KEPT", 4)
    batch = Batch(runtime, 4)
    values = tuple((position, float(position)) for position in range(30))
    batch.admit("a", PROMPT, Program((FeatureEdit("r", Patch(1, values)),)))
    for position in range(30):
        batch.step([("a", position, 1)])

    assert batch.close("a", 30)[0].tokens_in_scope == 29
    (running,) = runtime._programs._running.values()
    assert len(running.entries) <= 4


def test_a_recompute_replays_the_revision_of_each_position_and_reports_nothing_twice(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 1)
    first = Program((FeatureEdit("t", Add(1, 2.0)),), (ReadOut("t", top_k=2),))
    second = Program((FeatureEdit("t", Add(2, -3.0)),), first.read_outs)
    batch.admit("r", 4, first)
    batch.step([("r", 0, 4)])
    batch.step([("r", 4, 1)])
    batch.update("r", second)
    batch.step([("r", 5, 1)])
    once = dict(batch.edited)
    third = Program((FeatureEdit("t", AddRelative(3, 0.5)),), first.read_outs)
    batch.update("r", third)
    batch.step([("r", 0, 3)])
    batch.step([("r", 3, 4)])

    for key, edited in once.items():
        torch.testing.assert_close(batch.edited[key], edited)
    x = batch.x("r", 0, 6)
    expected = x + change_at(saved, third, batch, "r", 0, 6)
    torch.testing.assert_close(batch.edited["r", 0, 6], expected, atol=1e-5, rtol=1e-5)
    applied = [entry for result in batch.results["r"] for entry in result.applied]
    assert applied == [(1, 5), (2, 6)]
    positions = [p for r in batch.results["r"] for rows in r.rows for p in rows.positions.tolist()]
    assert positions == list(range(7))
    assert [r.tokens_in_scope for r in batch.close("r", 7)] == [4, 1, 1]


def test_a_row_computed_again_is_not_counted_beside_one_that_is_new(runtime: Runtime) -> None:
    batch = Batch(runtime, 12)
    for name, value in (("again", 1.0), ("on", 0.0)):
        batch.admit(name, 1, Program((FeatureEdit("t", Add(1, value)),)))
    batch.step([("again", 1, 1), ("on", 1, 1)])
    batch.step([("again", 1, 1), ("on", 2, 1)])

    for name, rows, changed in (("again", 1, 1), ("on", 2, 0)):
        (report,) = batch.close(name, 1 + rows)
        assert (report.tokens_in_scope, report.tokens_changed) == (rows, changed)


@pytest.mark.skipif("k" not in SERVED, reason="the kernels serve no TopK")
def test_edits_of_a_topk_take_its_full_width_of_some_rows_at_once(
    runtime: Runtime, saved: dict[str, Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, heights = Resident.encode, []

    def measured(resident: Resident, x: Tensor) -> Tensor:
        heights.append(len(x))
        return encode(resident, x)

    monkeypatch.setattr(residents_module, "PART_BYTES", 2 * 4 * N_FEATURES)
    monkeypatch.setattr(Resident, "encode", measured)
    batch = Batch(runtime, 6)
    scaled = tuple(FeatureEdit("k", Scale(feature, 3.0)) for feature in range(N_FEATURES))
    program = Program(scaled)
    batch.admit("x", PROMPT, program)
    batch.step([("x", 0, PROMPT)])

    site = saved["k"].site
    assert heights == [2, 2, 1]
    for position in range(PROMPT):
        x = batch.x("x", site, position)
        change = change_at(saved, program, batch, "x", site, position)
        torch.testing.assert_close(
            batch.edited["x", site, position], x + change, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("at_full_width", [False, True])
def test_read_outs_are_of_x_before_the_edits_or_after_them(
    runtime: Runtime,
    saved: dict[str, Saved],
    at_full_width: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if at_full_width:
        # As more features than the kernel lists, of more rows than are encoded at once.
        monkeypatch.setattr(readout, "MAX_K", 0)
        monkeypatch.setattr(residents_module, "PART_BYTES", 2 * 4 * N_FEATURES)
    batch = Batch(runtime, 2)
    features = (3, 1, 5)
    program = Program(
        (FeatureEdit("t", AddRelative(0, 2.0)), FeatureEdit("r", Clamp(4, 3.0))),
        (
            ReadOut("t", top_k=2),
            ReadOut("j", features=features, prompt=False),
            ReadOut("r", top_k=N_FEATURES, generated=False),
            ReadOut("t", top_k=3, edited=True),
            ReadOut("g", features=features, edited=True),
            ReadOut("i", above=0.5),
            ReadOut("t", above=0.0, row_bytes=16),
        ),
    )
    batch.admit("x", 3, program)
    batch.admit("other", 2, Program((), (ReadOut("t", top_k=4),)))
    batch.step([("other", 0, 2), ("plain", 0, 2), ("x", 0, 3)])
    batch.step([("x", 3, 1), ("other", 2, 1)])

    rows = {
        (r.read_out, int(p)): (r, i)
        for s in batch.results["x"]
        for r in s.rows
        for i, p in enumerate(r.positions)
    }
    expected = {(n, p) for n in (0, 3, 4, 5, 6) for p in range(4)}
    assert set(rows) == expected | {(1, 3)} | {(2, p) for p in range(3)}
    for (read_out, position), (entry, i) in rows.items():
        spec = program.read_outs[read_out]
        owner = saved[spec.dictionary]
        x = batch.edited if spec.edited else {}
        x = x.get(("x", owner.site, position), batch.x("x", owner.site, position))
        f = owner.dictionary.encode(x)
        part = slice(entry.row_splits[i], entry.row_splits[i + 1])
        got = dict(zip(entry.features[part].tolist(), entry.values[part].tolist(), strict=True))
        index = spec.features or f.abs().topk(min(spec.limit, N_FEATURES)).indices.tolist()
        want = {j: float(f[j]) for j in index if abs(f[j]) > (spec.above or 0.0)}
        assert list(got) == list(want)
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
        if entry.active is not None:
            assert entry.active[i] == np.count_nonzero(f)


@pytest.mark.skipif(not (GPU and KERNELS), reason="compiles for a GPU, which is pretended")
def test_a_gpu_is_warmed_up_for_few_rows_and_many_and_for_few_features_and_many(
    runtime: Runtime,
) -> None:
    before = encode_kernel._encode_chunk.launches

    runtime.warm_up()

    assert encode_kernel._encode_chunk.launches == before + 4


def test_an_op_that_does_not_run_is_an_error_and_not_silence(runtime: Runtime) -> None:
    batch = Batch(runtime, 0)
    scope = Scope(windows=((1, 2), (3, 4)))
    batch.admit("edit", 4, Program((FeatureEdit("t", Ablate(1), scope),)))
    batch.admit("read", 2, Program((), (ReadOut("t", top_k=1),)))
    batch.begin([("read", 0, 2), ("edit", 0, 4)])

    batch.end()
    assert [missed[:2] for missed in batch.said.missed] == [(1, 1)]
    for account in batch.accounts.values():
        with pytest.raises(EditNotApplied, match="did not run"):
            account.take()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_wrong_with_a_row_fails_no_read_out_of_others(runtime: Runtime) -> None:
    batch = Batch(runtime, 7)
    for name in ("wrong", "read"):
        batch.admit(name, 2, Program((), (ReadOut("t", top_k=1),)))
    batch.begin([("plain", 0, 1), ("wrong", 0, 1), ("read", 0, 2)])
    wrong = torch.full((2, D_MODEL), torch.nan)
    x = torch.stack([*wrong, batch.x("read", 0, 0), batch.x("read", 0, 1)])
    runtime.at_site(placed(x), None, 0)
    batch.end()

    result = batch.accounts["read"].take()

    assert result is not None
    assert result.rows[0].positions.tolist() == [0, 1]


def test_rows_missing_from_the_worker_fail_the_proof() -> None:
    program = Program((FeatureEdit("a", Ablate(1)),), ())
    account = Account([1] * 5, [program], token_ids=[1] * 4)

    with pytest.raises(EditNotApplied, match="ran on 0 tokens, its scope holds 7"):
        account.close()


def test_rows_from_the_prefix_cache_are_no_gap_in_the_proof(runtime: Runtime) -> None:
    batch = Batch(runtime, 4)
    batch.admit("r", 8, Program((FeatureEdit("t", Add(1, 1.0)),), ()))
    batch.step([("r", 2, 2)])
    # Preempted, and resumed behind what another request has cached since.
    batch.step([("r", 6, 2)])

    (report,) = batch.close("r", 8)
    assert report.tokens_in_scope == 4


# Triton's interpreter computes with numpy, which would rather not.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_edits_too_large_for_the_model_are_left_out_and_fail_their_request(
    runtime: Runtime,
) -> None:
    batch = Batch(runtime, 5)
    batch.admit("r", 2, Program((FeatureEdit("t", AddRelative(1, 3e4)),), ()))
    batch.admit("nan", 2, Program(tuple(FeatureEdit("t", Add(i, 3e38)) for i in range(4)), ()))
    batch.admit("fine", 2, Program((FeatureEdit("t", AddRelative(1, 9e3)),), ()))
    for name in ("r", "nan"):
        batch.begin([(name, 0, 2), ("fine", 1, 1)])
        x = torch.stack([batch.x(name, 0, 0), batch.x(name, 0, 1), batch.x("fine", 0, 1)])
        hidden = x.clone()
        runtime.at_site(placed(hidden), None, 0)
        batch.end()

        assert torch.equal(hidden[:2], x[:2])
        assert hidden[2].isfinite().all()
        assert not torch.equal(hidden[2], x[2])
        with pytest.raises(EditTooLarge, match="smaller strengths"):
            batch.accounts[name].take()


def test_a_token_past_its_programs_limit_fails_its_own_request_and_says_by_how_much(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    program = Program((FeatureEdit("t", Add(1, 2.0)),))

    def sizes_of(batch: Batch) -> list[float]:
        changes = [change_at(saved, program, batch, "r", 0, p).norm() for p in range(1, 6)]
        return [float(c / batch.x("r", 0, p).norm()) for p, c in enumerate(changes, 1)]

    # The largest is not on the first row of its run.
    batches = (Batch(runtime, seed) for seed in range(99))
    batch = next(batch for batch in batches if np.argmax(sizes_of(batch)) > 0)
    *_, second, largest = sorted(sizes_of(batch))
    position, limit = sizes_of(batch).index(largest) + 1, (second + largest) / 2
    batch.admit("r", 6, replace(program, max_relative_size=limit))
    batch.admit("fine", 6, replace(program, max_relative_size=9.0))

    with pytest.raises(EditTooLarge) as caught:
        batch.step([("fine", 0, 6), ("r", 0, 6)])

    said = re.search(r"at position (\d+) .* (\S+) times .* is (\S+); .*clamp", str(caught.value))
    assert said is not None
    assert list(map(float, said.groups())) == pytest.approx([position, largest, limit], rel=1e-3)
    assert [refused[:2] for refused in batch.said.too_large] == [(1, position)]
    x = batch.x("r", 0, position)
    assert torch.equal(batch.edited["r", 0, position], (x - 0.25) + 0.25)
    for name, p in (("r", 1), ("fine", 5)):
        moved = batch.edited[name, 0, p] - batch.x(name, 0, p)
        assert moved.norm() == pytest.approx(2.0, rel=1e-4)
    assert batch.accounts["fine"].limited_tokens == 0


def test_each_revision_has_its_own_limit_and_reports_what_was_added(runtime: Runtime) -> None:
    batch = Batch(runtime, 5)
    edits = (FeatureEdit("t", AddRelative(1, 0.6)), FeatureEdit("t", AddRelative(2, -0.6)))
    batch.admit("r", 2, Program(edits))
    batch.step([("r", 0, 2)])
    batch.update("r", Program(edits, (), 0.1, Oversize.CLAMP))
    batch.step([("r", 2, 1)])
    batch.update("r", Program(edits, (), 0.1, Oversize.WARN))
    batch.step([("r", 3, 1)])
    # A recompute clamps again, and counts nothing twice.
    batch.step([("r", 0, 5)])

    moved = [
        float((batch.edited["r", 0, p] - batch.x("r", 0, p)).norm() / batch.x("r", 0, p).norm())
        for p in range(5)
    ]
    whole = moved[1]
    assert moved == pytest.approx([0.0, whole, 0.1, whole, whole], rel=1e-4, abs=1e-6)
    sizes = [report.max_relative_size for report in batch.close("r", 5)]
    assert sizes == pytest.approx([0.6] * 2 + [0.6 * 0.1 / whole] * 2 + [0.6] * 2, rel=1e-4)
    assert batch.accounts["r"].limited_tokens == 3


def test_a_limit_leaves_no_trace_for_the_next_batch(runtime: Runtime) -> None:
    batch = Batch(runtime, 5)
    edits = (FeatureEdit("t", AddRelative(1, 0.6)),)
    batch.admit("r", 2, Program(edits, (), 0.1, Oversize.CLAMP))
    batch.step([("r", 0, 2)])
    batch.runtime.forget(["r"])
    batch.admit("s", 2, Program(edits))
    batch.step([("s", 0, 2)])

    moved = batch.edited["s", 0, 1] - batch.x("s", 0, 1)
    assert moved.norm() == pytest.approx(0.6 * batch.x("s", 0, 1).norm())


def test_an_update_holds_from_the_row_it_names_within_a_chunk(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 1)
    first = Program((FeatureEdit("t", Add(1, 2.0)),), (ReadOut("t", top_k=2),))
    second = Program((FeatureEdit("t", Add(2, -3.0)),), (ReadOut("t", features=(3,)),) * 2)
    batch.admit("r", 6, first)
    batch.update("r", second, 5)
    batch.step([("r", 0, 6)])
    batch.step([("r", 6, 1)])

    for position in range(7):
        held = first if position < 5 else second
        expected = batch.x("r", 0, position) + change_at(saved, held, batch, "r", 0, position)
        torch.testing.assert_close(batch.edited["r", 0, position], expected)
    applied = [entry for result in batch.results["r"] for entry in result.applied]
    assert applied == [(1, 5)]
    read = [(r.read_out, *r.positions) for s in batch.results["r"] for r in s.rows]
    assert sorted(read) == [(0, 0, 1, 2, 3, 4), (0, 5), (0, 6), (1, 5), (1, 6)]
    assert [report.tokens_in_scope for report in batch.close("r", 7)] == [4, 2]


def test_an_update_that_would_begin_behind_a_later_one_never_holds(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 1)
    programs = [Program(), *(Program((FeatureEdit("t", Add(i, 2.0)),)) for i in range(3))]
    batch.admit("r", 6, programs[0])
    for program, first in zip(programs[1:], (5, 2, 4), strict=True):
        batch.update("r", program, first)
    batch.step([("r", 0, 6)])

    for position in range(6):
        held = programs[0 if position < 2 else 2 if position < 4 else 3]
        expected = batch.x("r", 0, position) + change_at(saved, held, batch, "r", 0, position)
        torch.testing.assert_close(batch.edited["r", 0, position], expected)
    applied = [entry for result in batch.results["r"] for entry in result.applied]
    assert applied == [(1, 2), (2, 2), (3, 4)]
    assert [report.tokens_in_scope for report in batch.close("r", 6)] == [0, 2, 2]


def test_two_read_outs_of_one_request_do_not_shift_into_a_neighbour(
    runtime: Runtime, saved: dict[str, Saved]
) -> None:
    batch = Batch(runtime, 6)
    twice = (ReadOut("t", top_k=1), ReadOut("t", top_k=1), ReadOut("t", features=(2,)))
    batch.admit("one", 5, Program((), twice))
    batch.admit("two", 5, Program((), twice[:1]))
    batch.step([("one", 1, 1), ("plain", 1, 1), ("two", 1, 1)])

    f = saved["t"].dictionary.encode(batch.x("one", 0, 1))
    first, second, third = batch.results["one"][0].rows
    assert first.features.tolist() == second.features.tolist() == [int(f.argmax())]
    assert third.values.tolist() == pytest.approx([float(f[2])] if f[2] > 0 else [], rel=1e-4)


def test_the_time_that_encoding_took_is_told_once_for_the_batch(runtime: Runtime) -> None:
    batch = Batch(runtime, 6)
    for name in ("one", "two"):
        batch.admit(name, 5, Program((), (ReadOut("t", top_k=1),)))
    batch.step([("one", 1, 1), ("two", 1, 1)])

    told = [result for name in ("one", "two") for result in batch.results[name]]
    assert [list(result.encode_seconds) for result in told] == [["t"], []]


def test_ended_requests_are_forgotten_and_their_slots_are_free_again(runtime: Runtime) -> None:
    batch = Batch(runtime, 3)
    shared, alone = FeatureEdit("t", Ablate(1)), FeatureEdit("t", Add(2, 1.0))
    batch.admit("r", 1, Program((shared,)))
    batch.admit("s", 1, Program((shared, alone)))
    for strength in range(20):
        batch.update("s", Program((FeatureEdit("t", Add(2, float(strength))),)))
        batch.step([("s", 1 + strength, 1)])
    slots = runtime.banks[0].slots
    used = [slots.used]
    for names in (["s", "never seen"], ["r"]):
        runtime.forget(names)
        used.append(slots.used)

    assert used == [2, 1, 0]
    batch.begin([("r", 0, 1)])
    assert runtime.end_step() is None


@given(seeds, st.lists(st.sets(st.integers(0, 9), max_size=5), max_size=30))
def test_slots_are_counted_and_freed_in_any_order(seed: int, wanted: list[set[int]]) -> None:
    slots, held = Slots(8), []
    for features in wanted:
        asked = [("d", feature) for feature in features]
        if slots.fits(asked):
            slots.acquire(asked)
            held.append(asked)
        elif held:
            slots.release(held.pop(seed % len(held)))
        inuse = {feature for features in held for feature in features}
        assert slots.used == len(inuse) <= 8
        assert len({slots[feature] for feature in inuse}) == len(inuse)
    for asked in held:
        slots.release(asked)

    assert slots.used == 0


@pytest.mark.parametrize("wanted", [[3], [2, 3, 4], [1, 3, 2, 4], [4, 3], [0, 7]])
def test_the_bank_gives_rows_in_the_order_of_the_slots(wanted: list[int]) -> None:
    bank = Bank(8, 2, torch.device("cpu"))
    for slot in range(8):
        bank.rows.decoder[slot] = bank.decoder_norm[slot] = slot
    rows, norms = bank.at(np.array(wanted, np.int32))

    assert rows.decoder[:, 0].tolist() == norms.tolist() == wanted


def test_each_feature_has_its_own_rows_in_its_slot() -> None:
    bank, site = Bank(8, 3, torch.device("cpu")), Site.parse("resid_post.0")
    residents = Residents([site], [0], {0: bank}, torch.device("cpu"))
    made = {name: Dictionary.tied(torch.randn(5, 3), torch.randn(5)) for name in "ab"}
    for name in made:
        residents.add(name, site, made[name])
    features = [("a", 1), ("b", 1), ("b", 4), ("a", 0)]

    residents.acquire(features)

    for name, feature in features:
        slot, rows = bank.slots[name, feature], made[name].rows
        for mine, theirs in zip(bank.rows, rows, strict=True):
            assert torch.equal(mine[slot], theirs[feature])
        assert bank.decoder_norm[slot] == rows.decoder[feature].norm()


def test_a_dictionary_of_an_unserved_site_or_with_other_bytes_is_refused(
    saved: dict[str, Saved],
) -> None:
    runtime = Runtime(SITES[:1], [0], D_MODEL, 8, torch.device("cpu"), kernel_rows=8)

    with pytest.raises(DictionaryMismatch, match=r"resid_post\.3"):
        runtime.residents.load("r", saved["r"].folder, saved["r"].arithmetic)
    with pytest.raises(CorruptDictionary, match="changed"):
        runtime.residents.load("t", saved["t"].folder, "0" * 64)
    with pytest.raises(DictionaryMismatch, match="CUDA graphs"):
        runtime.residents.add("k", SITES[0], saved["k"].dictionary)


@pytest.mark.parametrize("later", ["j", "i"], ids=["same site", "another site"])
def test_another_dictionary_of_an_unloaded_ones_name_meets_nothing_of_it(
    runtime: Runtime, saved: dict[str, Saved], later: str
) -> None:
    program = Program((FeatureEdit("t", Add(1, 2.0)),))
    batch = Batch(runtime, 5)
    batch.admit("kept", PROMPT, Program((FeatureEdit("r", Add(1, 1.0)),)))
    batch.admit("old", PROMPT, program)
    batch.step([("kept", 0, 2), ("old", 0, 2)])
    # Its end is told with the coming step only.
    runtime.unload("t")
    load(runtime, "t", saved[later])
    runtime.forget(["old"])
    batch.admit("new", PROMPT, program)
    batch.step([("kept", 2, 2), ("new", 0, 2)])

    other = saved | {"t": saved[later]}
    for name, position in (("new", 1), ("kept", 1), ("kept", 3)):
        asked = program if name == "new" else Program((FeatureEdit("r", Add(1, 1.0)),))
        for site in (0, 1):
            x = batch.x(name, site, position)
            change = change_at(other, asked, batch, name, site, position)
            torch.testing.assert_close(batch.edited[name, site, position], x + change)
    runtime.forget(["kept", "new"])
    assert runtime.counts()["slots"] == 0


@pytest.mark.parametrize("during_a_step", [False, True])
def test_an_unloaded_dictionarys_rows_are_not_kept(
    runtime: Runtime, saved: dict[str, Saved], during_a_step: bool
) -> None:
    batch = Batch(runtime, 6)
    batch.admit("old", PROMPT, Program(read_outs=(ReadOut("t", top_k=2),)))
    batch.step([("old", 0, 2)])
    rows = weakref.ref(runtime.residents["t"].rows.decoder)
    if during_a_step:
        batch.begin([("old", 2, 1)])
    runtime.unload("t")
    if during_a_step:
        runtime.end_step()
        batch.begin([("plain", 0, 1)])

    gc.collect()
    assert rows() is None or rows() is saved["t"].dictionary.W_dec
