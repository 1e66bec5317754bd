"""Edits row by row against the dense products, which are held to the definition elsewhere."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.edits import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    Edit,
    Limit,
    Scale,
    coefficients,
)
from steer_server.dictionary.site import Site
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.dense_site import DensePlan
from steer_server.vllm_plugin.edit_rows import RowPlan
from steer_server.vllm_plugin.residents import Residents
from steer_server.vllm_plugin.site_edits import Bounds, Entries, Run, SiteEdits

D_MODEL, N_FEATURES, SLOTS = 24, 10, 16
CPU = torch.device("cpu")
SITE = Site.parse("resid_post.0")
PROGRAMS: list[list[Edit]] = [
    [Ablate(1), Clamp(2, 3.0), Scale(3, 2.5), Add(4, -1.0), AddRelative(5, 0.3)],
    [Limit(1, 0.1, 0.4), Add(6, 2.0), Limit(2, low=0.2)],
    [AddRelative(7, -0.2)],
]


class Case:
    """A dictionary at a site, its features in slots in another order than theirs, and a batch."""

    def __init__(self, k: int = 0) -> None:
        torch.manual_seed(0)
        rows = torch.nn.functional.normalize(torch.randn(N_FEATURES, D_MODEL), dim=1)
        dictionary = Dictionary.tied(rows, torch.full((N_FEATURES,), -0.2))
        lengths = torch.linspace(0.5, 2.0, N_FEATURES)[:, None]
        dictionary = replace(dictionary, W_dec=dictionary.W_dec * lengths)
        if k:
            dictionary = replace(dictionary, activation=Activation.TOP_K, k=k)
        self.bank = Bank(SLOTS, D_MODEL, CPU)
        self.residents = Residents([SITE], [0], {0: self.bank}, CPU)
        self.residents.add("d", SITE, dictionary)
        self.residents.acquire([("d", feature) for feature in (7, 3)])
        self.residents.acquire([("d", feature) for feature in range(N_FEATURES)])
        self.hidden, self.residual = torch.randn(2, 9, D_MODEL)

    def edits(self, runs: list[tuple[int, int, int]], **changes: Any) -> SiteEdits:
        """Runs of (first row, last row, program); `changes` are of each program's `Entries`."""
        entries = [replace(self.entries(edits), **changes) for edits in PROGRAMS]
        return SiteEdits(
            [
                Run(index, first, last, 0, entries[program], fresh=True)
                for index, (first, last, program) in enumerate(runs)
            ]
        )

    def entries(self, edits: list[Edit]) -> Entries:
        slots = np.array([self.bank.slots["d", edit.feature] for edit in edits], np.int32)
        numbers = np.array([coefficients(edit) for edit in edits], np.float32).T
        always = np.full(len(edits), -np.inf, np.float32)
        return Entries(np.arange(len(edits), dtype=np.uint32), slots, numbers, slots, always)

    def suits(self, edits: SiteEdits, *batch: Tensor) -> bool:
        hidden, residual = batch or (self.hidden, self.residual)
        return RowPlan.suits(edits, self.bank, self.residents, hidden, residual)


@pytest.mark.parametrize("two", [True, False], ids=["with residual", "alone"])
@pytest.mark.parametrize(
    "runs",
    [
        [(0, 9, 0)],
        [(2, 5, 1), (5, 6, 0), (6, 8, 2)],
        [(0, 1, 2), (3, 6, 0), (7, 9, 1)],
    ],
    ids=["all", "together", "apart"],
)
def test_rows_move_as_by_dense_products(runs: list[tuple[int, int, int]], two: bool):
    case = Case()
    edits = case.edits(runs)
    residual = case.residual if two else None
    by_rows, dense = case.hidden.clone(), case.hidden.clone()

    assert case.suits(edits)
    found = RowPlan(edits, case.bank).apply(by_rows, residual)
    expected = DensePlan(edits, case.bank, case.residents, 9).apply(dense, residual)

    torch.testing.assert_close(by_rows, dense)
    torch.testing.assert_close(torch.from_numpy(found.change), expected.change)
    torch.testing.assert_close(torch.from_numpy(found.x_norm), expected.x_norm)
    norms = expected.decoder_norm.expand_as(expected.change)
    torch.testing.assert_close(torch.from_numpy(found.decoder_norm), norms)
    assert found.applied.all()
    edited = {row for first, last, _ in runs for row in range(first, last)}
    for row in set(range(9)) - edited:
        assert torch.equal(by_rows[row], case.hidden[row])


def test_a_delta_that_is_too_large_leaves_its_row_and_no_other():
    case = Case()
    case.hidden[4] *= 1e-7
    hidden = case.hidden.clone()

    outcome = RowPlan(case.edits([(0, 9, 1)]), case.bank).apply(hidden, None)

    assert outcome.applied.flatten().tolist() == [row != 4 for row in range(9)]
    assert torch.equal(hidden[4], case.hidden[4])
    assert not torch.equal(hidden[3], case.hidden[3])


@pytest.mark.parametrize("shape", [(8, D_MODEL), (9, D_MODEL + 1)])
def test_a_batch_of_another_shape_is_refused(shape: tuple[int, int]):
    case = Case()
    plan = RowPlan(case.edits([(0, 9, 0)]), case.bank)

    with pytest.raises(ValueError, match="edits of rows to 8"):
        plan.apply(torch.zeros(shape), None)
    with pytest.raises(ValueError, match="edits of rows to 8"):
        plan.apply(case.hidden, torch.zeros(shape))


def test_it_is_for_few_edits_that_need_no_more_than_their_own_feature(
    monkeypatch: pytest.MonkeyPatch,
):
    case = Case()
    assert case.suits(case.edits([(0, 9, 0)]))

    many = torch.zeros(600, D_MODEL)
    assert not case.suits(case.edits([(0, 600, 2)]), many, many)
    assert not case.suits(case.edits([(0, 9, 0)]), case.hidden, case.residual.half())
    assert not case.suits(case.edits([(0, 9, 0)]), case.hidden, torch.randn(D_MODEL, 9).T)
    assert not case.suits(case.edits([(0, 9, 0)], bounds=Bounds(limit=0.5)))
    assert not case.suits(case.edits([(0, 9, 2)], when_above=np.zeros(1, np.float32)))
    ranked = Case(k=3)
    assert not ranked.suits(ranked.edits([(0, 9, 0)]))
    # Nine rows of five edits.
    for entries, per_row, few in ((44, 0, False), (45, 0, True), (0, 4, False), (9, 4, True)):
        monkeypatch.setattr("steer_server.vllm_plugin.edit_rows._MOST_ENTRIES", entries)
        monkeypatch.setattr("steer_server.vllm_plugin.edit_rows._MOST_PER_ROW", per_row)
        assert case.suits(case.edits([(0, 9, 0)])) is few
