"""One step's edits at one site: which rows, which coefficients, and what became of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.program import MAX_RELATIVE_SIZE, Oversize, Program
from steer_server.vllm_plugin.report import EditBlock, EditRows, EditRuns, relative_size


class Bounds(NamedTuple):
    """How far a program's edits may move a row, in lengths of x."""

    limit: float = math.inf
    """Rows past it are counted."""
    most: float = math.inf
    """The delta is scaled down to it."""
    refused: float = MAX_RELATIVE_SIZE
    """Past it the row stays as it was, and its request fails."""

    @classmethod
    def of(cls, program: Program) -> "Bounds":
        limit = program.max_relative_size
        if limit is None:
            return cls()
        match program.oversize:
            case Oversize.REJECT:
                return cls(limit, refused=limit)
            case Oversize.CLAMP:
                return cls(limit, most=limit)
            case Oversize.WARN:
                return cls(limit)


@dataclass(frozen=True, eq=False)
class Entries:
    """The edits of one program that hold together at one site; the arrays align."""

    indices: NDArray[np.uint32]
    """Of the edits among the revision's."""
    slot: NDArray[np.int32]
    numbers: NDArray[np.float32]
    """`edits.Coefficients`, [5, entries]."""
    when_slot: NDArray[np.int32]
    when_above: NDArray[np.float32]
    """-inf: always."""
    bounds: Bounds = field(default_factory=Bounds)

    @cached_property
    def conditional(self) -> bool:
        """Whether one has a condition."""
        return bool((self.when_above > -np.inf).any())

    @cached_property
    def limiting(self) -> bool:
        """Whether one brings its activation into bounds."""
        return bool(np.isfinite(self.numbers[3:]).any())

    @cached_property
    def relative(self) -> bool:
        """Whether one adds a share of the norm."""
        return bool(self.numbers[2].any())

    @cached_property
    def reads(self) -> bool:
        """Whether an activation matters: what only adds need not know it."""
        return self.conditional or self.limiting or bool(self.numbers[0].any())


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
    bounds: NDArray[np.float32] | None
    """`Bounds`, [3, lines]; None if no program of the step has a limit."""


_Table = TypeVar("_Table", Tensor, NDArray[Any])


class Outcome(NamedTuple, Generic[_Table]):
    """What the op did, row by row of the site's edits: proof that it ran, and how far it moved what."""

    change: _Table
    """f' - f, [rows, entries]."""
    x_norm: _Table
    """|x|, [rows, 1]."""
    decoder_norm: _Table
    """[rows or 1, entries]."""
    applied: _Table
    """False for rows left as they were because the delta was too large, [rows, 1]."""
    size: _Table | None = None
    """|delta| before it was scaled down, [rows, 1]; None if no program of the step has a limit."""


@dataclass
class SitePass:
    """What one pass left at a site; what is None was not asked for, or did not run."""

    outcome: Outcome[Any] | None = None
    before: Tensor | None = None
    """x of all rows before any edit, in float32."""
    after: Tensor | None = None


class _RowBounds(NamedTuple):
    """`Bounds` of each row, [rows, 1]."""

    limit: NDArray[np.float32]
    most: NDArray[np.float32]
    refused: NDArray[np.float32]


class SiteEdits:
    """The runs of one site in a step; there is at least one."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._lengths = [run.last - run.first for run in runs]
        first, last = runs[0].first, runs[-1].last
        self.rows: slice | Tensor = slice(first, last)
        if last - first != sum(self._lengths):
            parts = [np.arange(run.first, run.last) for run in runs]
            self.rows = torch.from_numpy(np.concatenate(parts))
        number: dict[int, int] = {}
        distinct = []
        for run in runs:
            if id(run.entries) not in number:
                number[id(run.entries)] = len(distinct)
                distinct.append(run.entries)
        self.distinct: Sequence[Entries] = distinct
        self.line_of_row = np.repeat([number[id(run.entries)] for run in runs], self._lengths)
        self._single = max(self._lengths) == 1
        """Whether each run is one row."""
        width = max(len(entries.slot) for entries in distinct)
        self._whole = all(run.fresh and len(run.entries.slot) == width for run in runs)
        """Whether every run is reported, and has as many entries as the table is wide."""
        self._norms = b""

    @cached_property
    def lines(self) -> Lines:
        shape = len(self.distinct), max(len(entries.slot) for entries in self.distinct)
        # What pads a line names a slot in use, and changes nothing there.
        slot = np.full(shape, self.distinct[0].slot[0], np.int32)
        numbers = np.zeros((5, *shape), np.float32)
        numbers[3], numbers[4] = -np.inf, np.inf
        when_slot, when_above = slot.copy(), np.full(shape, -np.inf, np.float32)
        for line, entries in enumerate(self.distinct):
            n = len(entries.slot)
            slot[line, :n] = entries.slot
            numbers[:, line, :n] = entries.numbers
            when_slot[line, :n] = entries.when_slot
            when_above[line, :n] = entries.when_above
        length = np.array([len(entries.slot) for entries in self.distinct], np.int32)
        bounds = None
        if any(entries.bounds != Bounds() for entries in self.distinct):
            bounds = np.array([entries.bounds for entries in self.distinct], np.float32).T
        return Lines(slot, numbers, when_slot, when_above, length, bounds)

    def collect(self, outcome: Outcome[NDArray]) -> EditBlock | EditRows:
        """What the edits did, once per row."""
        change, x_norm, decoder_norm, _, size = outcome
        if self._single and self._whole and size is None:
            if not self._norms:
                self._norms = np.broadcast_to(decoder_norm, change.shape).tobytes()
            return EditRows(self._packed, self._norms, change.tobytes(), x_norm.tobytes())
        changed: NDArray[np.uint32] = (change != 0).astype(np.uint32)
        total = relative_size(change, x_norm, decoder_norm)
        if size is not None:
            total *= self._scale(size, x_norm)
        largest = total
        if not self._single:
            changed = np.add.reduceat(changed, self._starts, axis=0, dtype=np.uint32)
            largest = np.maximum.reduceat(total, self._starts, axis=0)
            total = np.add.reduceat(total, self._starts, axis=0)
        return EditBlock(self._packed, *map(self._reported, (changed, total, largest)))

    def _scale(self, size: NDArray, x_norm: NDArray) -> NDArray[np.float32]:
        """The part of each row's delta that was added, [rows, 1]."""
        most = self._bounds.most * x_norm
        return np.divide(most, size, out=np.ones_like(size), where=size > most)

    def limited(self, outcome: Outcome[NDArray]) -> list[tuple[int, int]]:
        """(request, rows past its program's limit), each row once."""
        if outcome.size is None:
            return []
        over = (outcome.size > self._bounds.limit * outcome.x_norm)[:, 0]
        rows = np.add.reduceat(over, self._starts, dtype=np.int64)[self._fresh].tolist()
        requests = [self.runs[i].request for i in self._fresh]
        return [(request, n) for request, n in zip(requests, rows, strict=True) if n]

    def too_large(
        self, outcome: Outcome[NDArray], positions: NDArray[np.int64]
    ) -> list[tuple[int, int, str]]:
        """(request, first such position, why) of those with a row that was left as it was.

        `positions` are those of the batch rows.
        """
        found: dict[int, tuple[int, str]] = {}
        sizes: NDArray[np.float32] | None = None
        if outcome.size is not None:
            size, x_norm = outcome.size, outcome.x_norm
            limit, _, refused = self._bounds
            # Where the program's own limit was passed; else what holds for all was.
            sizes = np.where((limit == refused) & (size > limit * x_norm), size / x_norm, np.nan)
        for row in np.flatnonzero(~outcome.applied[:, 0]).tolist():
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            run = self.runs[number]
            if run.request not in found:
                size = math.nan if sizes is None else float(sizes[row, 0])
                position = int(positions[run.first + row - self._starts[number]])
                found[run.request] = position, _why(run.entries.bounds, size, position)
        return [(request, *where_and_why) for request, where_and_why in sorted(found.items())]

    def _reported(self, table: NDArray[Any]) -> bytes:
        """What of [runs, entries] belongs to entries that are there, of runs that were not counted before."""
        return (table if self._whole else table[self._fresh][self._valid]).tobytes()

    @cached_property
    def _bounds(self) -> _RowBounds:
        """Of a step with a limit."""
        assert self.lines.bounds is not None
        return _RowBounds(*self.lines.bounds[:, self.line_of_row, None])

    @cached_property
    def _starts(self) -> NDArray[np.intp]:
        return np.cumsum([0, *self._lengths[:-1]])

    @cached_property
    def _fresh(self) -> NDArray[np.intp]:
        return np.flatnonzero([run.fresh for run in self.runs])

    @cached_property
    def _valid(self) -> NDArray[np.bool_]:
        entries = np.array([len(self.runs[i].entries.slot) for i in self._fresh])
        return np.arange(self.lines.slot.shape[1]) < entries[:, None]

    @cached_property
    def _packed(self) -> bytes:
        runs = [run for run in self.runs if run.fresh]
        columns = (
            [run.request for run in runs],
            [run.revision for run in runs],
            [run.last - run.first for run in runs],
            [len(run.entries.slot) for run in runs],
        )
        indices = [run.entries.indices for run in runs] or [np.empty(0, np.uint32)]
        request, revision, rows, entries = np.array(columns, np.int32)
        edit = np.concatenate(indices).astype(np.int32)
        return EditRuns(request, revision, rows, entries, edit).pack()


def _why(bounds: Bounds, size: float, position: int) -> str:
    """Why a row was left as it was; `size` in lengths of x if it is past its program's own limit, else NaN."""
    if not math.isnan(size):
        return (
            f"at position {position} the edits would have moved x by {size:.4g} times its length, and this program's "
            f"max_relative_size is {bounds.limit:g}; use smaller strengths, raise it, or let oversize be clamp or warn"
        )
    return (
        f"the edits would have moved x by more than {MAX_RELATIVE_SIZE:g} times its length, or past the largest number "
        f"of the model's dtype, at position {position}; use smaller strengths"
    )
