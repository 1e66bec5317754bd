"""One step's edits at one site: which rows, which coefficients, and what became of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.vllm_plugin.report import EditBlock

MAX_RELATIVE_SIZE = 1e4
"""Largest |delta| / |x| of a row. Past some 1e13 the squares in the next norm overflow, and a NaN in a KV block
would outlive its request: vLLM does not clear blocks that it hands on."""


class Entries(NamedTuple):
    """The edits of one program that hold together at one site; the arrays align."""

    indices: NDArray[np.uint32]
    """Of the edits among the revision's."""
    slot: NDArray[np.int32]
    numbers: NDArray[np.float32]
    """`edits.Coefficients`, [5, entries]."""
    when_slot: NDArray[np.int32]
    when_above: NDArray[np.float32]
    """-inf: always."""


class Run(NamedTuple):
    """Batch rows [first, last) of one request on which the same edits hold."""

    request: int
    """Index into the step's requests."""
    first: int
    last: int
    revision: int
    entries: Entries
    fresh: bool
    """False for rows recomputed after a preemption, which were counted before."""


class Lines(NamedTuple):
    """The distinct entries of a step side by side, [lines, entries]; shorter lines end in entries that do nothing."""

    slot: NDArray[np.int32]
    numbers: NDArray[np.float32]
    """[5, lines, entries]."""
    when_slot: NDArray[np.int32]
    when_above: NDArray[np.float32]
    length: NDArray[np.int32]
    """Entries of each line that do something."""


class Outcome(NamedTuple):
    """What the op did, row by row of the site's edits: proof that it ran, and how far it moved what."""

    change: Tensor
    """f' - f, [rows, entries]."""
    x_norm: Tensor
    """|x|, [rows, 1]."""
    decoder_norm: Tensor
    """[rows or 1, entries]."""
    applied: Tensor
    """False for rows left as they were because the delta was too large, [rows, 1]."""


@dataclass
class SitePass:
    """What one pass left at a site; what is None was not asked for, or did not run."""

    outcome: Outcome | None = None
    before: Tensor | None = None
    """x of all rows before any edit, in float32."""
    after: Tensor | None = None


class SiteEdits:
    """The runs of one site in a step; there is at least one."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.lengths = np.array([run.last - run.first for run in runs])
        first, last = runs[0].first, runs[-1].last
        together = last - first == int(self.lengths.sum())
        self.rows: slice | Tensor = slice(first, last)
        if not together:
            parts = [np.arange(run.first, run.last) for run in runs]
            self.rows = torch.from_numpy(np.concatenate(parts))
        number: dict[int, int] = {}
        self._distinct = []
        for run in runs:
            if id(run.entries) not in number:
                number[id(run.entries)] = len(self._distinct)
                self._distinct.append(run.entries)
        self.line_of_row = np.repeat([number[id(run.entries)] for run in runs], self.lengths)

    @cached_property
    def lines(self) -> Lines:
        shape = len(self._distinct), max(len(entries.slot) for entries in self._distinct)
        # What pads a line names a slot in use, and changes nothing there.
        slot = np.full(shape, self._distinct[0].slot[0], np.int32)
        numbers = np.zeros((5, *shape), np.float32)
        numbers[3], numbers[4] = -np.inf, np.inf
        when_slot, when_above = slot.copy(), np.full(shape, -np.inf, np.float32)
        for line, entries in enumerate(self._distinct):
            n = len(entries.slot)
            slot[line, :n] = entries.slot
            numbers[:, line, :n] = entries.numbers
            when_slot[line, :n] = entries.when_slot
            when_above[line, :n] = entries.when_above
        length = np.array([len(entries.slot) for entries in self._distinct], np.int32)
        return Lines(slot, numbers, when_slot, when_above, length)

    def collect(self, outcome: Outcome) -> tuple[EditBlock, list[int]]:
        """What the edits did, once per row; and the requests with a row where they were too large.

        The outcome is on the host.
        """
        change, x_norm, decoder_norm, applied = (tensor.numpy() for tensor in outcome)
        changed: NDArray[np.uint32] = (change != 0).astype(np.uint32)
        total = np.asarray(np.abs(change) * (decoder_norm / x_norm), np.float32)
        largest = total
        if not self._single:
            changed = np.add.reduceat(changed, self._starts, axis=0, dtype=np.uint32)
            largest = np.maximum.reduceat(total, self._starts, axis=0)
            total = np.add.reduceat(total, self._starts, axis=0)
        block = EditBlock(
            *self._fixed, self._reported(changed), self._reported(total), self._reported(largest)
        )
        if applied.all():
            return block, []
        held = np.logical_and.reduceat(applied[:, 0], self._starts)
        return block, sorted(
            {run.request for run, fine in zip(self.runs, held, strict=True) if not fine}
        )

    def _reported(self, table: NDArray[Any]) -> NDArray[Any]:
        """What of [runs, entries] belongs to entries that are there, of runs that were not counted before."""
        return (table if self._whole else table[self._fresh][self._valid]).ravel()

    @cached_property
    def _single(self) -> bool:
        """Whether each run is one row."""
        return bool((self.lengths == 1).all())

    @cached_property
    def _whole(self) -> bool:
        """Whether every run is reported, and has as many entries as the table is wide."""
        return len(self._fresh) == len(self.runs) and bool(self._valid.all())

    @cached_property
    def _starts(self) -> NDArray[np.intp]:
        return np.cumsum([0, *self.lengths[:-1]])

    @cached_property
    def _fresh(self) -> NDArray[np.intp]:
        return np.flatnonzero([run.fresh for run in self.runs])

    @cached_property
    def _valid(self) -> NDArray[np.bool_]:
        entries = np.array([len(self.runs[i].entries.slot) for i in self._fresh])
        return np.arange(self.lines.slot.shape[1]) < entries[:, None]

    @cached_property
    def _fixed(self) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
        """The columns of the block that do not depend on the outcome."""
        runs = [self.runs[i] for i in self._fresh]
        columns = (
            [run.request for run in runs],
            [run.revision for run in runs],
            [run.last - run.first for run in runs],
            [len(run.entries.slot) for run in runs],
        )
        indices = [run.entries.indices for run in runs] or [np.empty(0, np.uint32)]
        request, revision, rows, entries = (np.array(column, np.int32) for column in columns)
        return request, revision, rows, entries, np.concatenate(indices)
