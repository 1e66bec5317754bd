"""The op as one Triton launch over tables at fixed addresses, which a captured CUDA graph may replay."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.admission import MAX_EDITS
from steer_server.program import MAX_RELATIVE_SIZE
from steer_server.vllm_plugin import edit_kernel
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.edit_kernel import READ_AFTER, READ_BEFORE, edit_rows
from steer_server.vllm_plugin.site_edits import Outcome, SiteEdits, SitePass
from steer_server.vllm_plugin.transfer import to_device


class KernelSite:
    """One site; whatever it is told, it writes into its tables, and the kernel finds it there.

    A replayed graph runs no Python, so that the kernel ran is told by what it wrote: before each pass marks are set
    where it must write, and a mark that is still there afterwards fails the request.
    """

    def __init__(self, bank: Bank, d_model: int, max_rows: int) -> None:
        device = bank.decoder_norm.device
        self._bank = edit_kernel.Bank(*bank.rows, bank.decoder_norm)
        # A row may have a line of its own; line 0 does nothing.
        shape = max_rows + 1, MAX_EDITS
        whole, real = torch.int32, torch.float32
        kinds = [whole, *[real] * 5, whole, real]
        self._lines = edit_kernel.Lines(
            torch.zeros(max_rows + 1, dtype=whole, device=device),
            *(torch.zeros(shape, dtype=kind, device=device) for kind in kinds),
            most=torch.full((max_rows + 1,), torch.inf, device=device),
            refused=torch.full((max_rows + 1,), MAX_RELATIVE_SIZE, device=device),
        )
        self._limited = False
        """Whether some line has a limit."""
        self._row_line = torch.zeros(max_rows, dtype=whole, device=device)
        self._row_read = torch.zeros(max_rows, dtype=whole, device=device)
        self._out = edit_kernel.Outcome(
            torch.zeros(max_rows, MAX_EDITS, device=device),
            torch.zeros(max_rows, device=device),
            torch.zeros(max_rows, device=device),
            torch.zeros(max_rows, dtype=whole, device=device),
            torch.zeros(max_rows, d_model, device=device),
            torch.zeros(max_rows, d_model, device=device),
        )
        self._edits: SiteEdits | None = None
        self._slot: Tensor | None = None
        self._edited: slice | Tensor = slice(0)
        """Which rows the edits are on."""
        self._before = self._after = False
        self._n_rows = 0

    def prepare(self, edits: SiteEdits | None, before: bool, after: bool, n_rows: int) -> None:
        """As `DenseSite.prepare`."""
        line = np.zeros(max(n_rows, self._n_rows), np.int32)
        if edits is not None:
            self._write_lines(edits)
            rows = edits.rows
            at = rows if isinstance(rows, slice) else rows.numpy()
            line[at] = edits.line_of_row + 1
            self._edited = at if isinstance(at, slice) else to_device(at, self._row_line.device)
        read = np.zeros_like(line)
        read[:n_rows] = READ_BEFORE * before + READ_AFTER * after
        # Those of a longer pass before are cleared with it.
        _write(self._row_line, line)
        _write(self._row_read, read)
        self._edits, self._before, self._after, self._n_rows = edits, before, after, n_rows

    def begin(self) -> None:
        """A pass is coming: sets the marks."""
        if self._edits is not None:
            self._out.x_norm[: self._n_rows] = -1.0
        for wanted, x in ((self._before, self._out.x_before), (self._after, self._out.x_after)):
            if wanted:
                x[: self._n_rows, 0] = torch.nan

    def run(self, hidden: Tensor, residual: Tensor | None) -> None:
        """The op's body; also what a graph captures."""
        edit_rows(
            hidden,
            residual,
            self._bank,
            self._lines,
            self._row_line[: len(hidden)],
            self._row_read[: len(hidden)],
            self._out,
        )

    def end(self) -> SitePass:
        """What the pass left; `before` and `after` are overwritten by the next one."""
        found = SitePass()
        out, n_rows = self._out, self._n_rows
        if self._edits is not None:
            rows, width = self._edited, self._edits.lines.slot.shape[1]
            assert self._slot is not None
            found.outcome = Outcome(
                out.change[rows, :width].clone(),
                out.x_norm[rows, None].clone(),
                self._bank.decoder_norm[self._slot],
                out.applied[rows, None] != 0,
                out.size[rows, None].clone() if self._limited else None,
            )
        if self._before:
            found.before = out.x_before[:n_rows]
        if self._after:
            found.after = out.x_after[:n_rows]
        return found

    def _write_lines(self, edits: SiteEdits) -> None:
        lines = edits.lines
        n, width = lines.slot.shape
        columns = (lines.slot, *lines.numbers, lines.when_slot, lines.when_above)
        for mine, theirs in zip(self._lines[1:-2], columns, strict=True):
            _write(mine[1 : n + 1, :width], theirs)
        _write(self._lines.counts[1 : n + 1], lines.length)
        if lines.bounds is not None:
            for mine, theirs in zip(self._lines[-2:], lines.bounds[1:], strict=True):
                _write(mine[1 : n + 1], theirs)
        elif self._limited:
            self._lines.most.fill_(torch.inf)
            self._lines.refused.fill_(MAX_RELATIVE_SIZE)
        self._limited = lines.bounds is not None
        slot = lines.slot[edits.line_of_row].astype(np.int64)
        self._slot = to_device(slot, self._row_line.device)


def _write(table: Tensor, values: NDArray) -> None:
    part = table[: len(values)]
    host = torch.from_numpy(np.ascontiguousarray(values))
    part.copy_(host.pin_memory() if table.is_cuda else host, non_blocking=table.is_cuda)
