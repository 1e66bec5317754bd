"""Edits of few rows on the CPU, one row after the other in compiled code.

A decoding step's arithmetic takes less time than torch's calls for it, each on caches that the model has left cold.
Importing this compiles it, which takes a second.
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.program import MAX_RELATIVE_SIZE
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.residents import Residents
from steer_server.vllm_plugin.site_edits import Outcome, SiteEdits

_MOST_ROWS, _MOST_ENTRIES, _MOST_PER_ROW = 512, 4096, 8
"""Up to so many rows, and so many entries of all rows together and `_MOST_PER_ROW` for each row besides, it is faster than
dense products: those share the arithmetic among threads, but write several tables of the rows."""


class RowPlan:
    """`SiteEdits` ready to run, as `dense_site.DensePlan` and with the same promises."""

    def __init__(self, edits: SiteEdits, bank: Bank) -> None:
        lines = edits.lines
        rows = edits.rows
        self._rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
        self._last = edits.runs[-1].last - 1
        self._line = edits.line_of_row
        self._slot = lines.slot
        encoder, bias, threshold, decoder = (tensor.numpy() for tensor in bank.rows)
        self._encoder, self._bias = encoder, bias
        self._threshold, self._decoder = threshold, decoder
        norms = bank.decoder_norm.numpy()[lines.slot]
        self._numbers = lines.numbers.copy()
        self._numbers[2] /= norms
        self._norms = norms[edits.line_of_row]
        self._reads = any(entries.reads for entries in edits.distinct)

    @staticmethod
    def suits(
        edits: SiteEdits, bank: Bank, residents: Residents, hidden: Tensor, residual: Tensor | None
    ) -> bool:
        """Whether there are few edits, and none that needs more of x than its own feature and float32."""
        lines = edits.lines
        batch = [hidden] if residual is None else [hidden, residual]
        return (
            all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in batch)
            and (n := len(edits.line_of_row)) <= _MOST_ROWS
            and n * lines.slot.shape[1] <= _MOST_ENTRIES + n * _MOST_PER_ROW
            and lines.bounds is None
            and not any(entries.conditional for entries in edits.distinct)
            and not any(
                residents[bank.slots.owner[slot][0]].k for slot in set(lines.slot.ravel().tolist())
            )
        )

    def apply(self, hidden: Tensor, residual: Tensor | None) -> Outcome[NDArray[Any]]:
        """Adds the edits' delta to `hidden`; x is the sum of both, where there are two."""
        batch = hidden.numpy()
        other = batch[:0] if residual is None else residual.numpy()
        rows, width = batch.shape
        # Compiled code would not notice that it reads and writes elsewhere.
        short = rows <= self._last or width != self._encoder.shape[1]
        if short or (residual is not None and other.shape != batch.shape):
            raise ValueError(f"edits of rows to {self._last}, and {batch.shape} is the batch")
        change, x_norm, applied = _edit_rows(
            batch,
            other,
            self._rows,
            self._line,
            self._slot,
            self._numbers,
            self._encoder,
            self._bias,
            self._threshold,
            self._decoder,
            self._reads,
        )
        return Outcome(change, x_norm, self._norms, applied)


# Sums in any order, as products by a library have them; all else in the order that is written. Loops over arrays that are
# known to be dense become vector instructions; numba's own array expressions do not.
_SUMS = {"reassoc", "contract"}


@numba.njit("f4(f4[::1], f4[::1])", fastmath=_SUMS)
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@numba.njit("void(f4[::1], f4[::1], f4[::1])")
def _sum(total, a, b):
    for i in range(len(total)):
        total[i] = a[i] + b[i]


@numba.njit("void(f4[::1], f4, f4[::1])")
def _scale(scaled, factor, row):
    for i in range(len(scaled)):
        scaled[i] = factor * row[i]


@numba.njit("void(f4[::1], f4, f4[::1])", fastmath=_SUMS)
def _add_scaled(total, factor, row):
    for i in range(len(total)):
        total[i] += factor * row[i]


@numba.njit("f4(f4, f4, f4[:])")
def _change(f, x_norm, numbers):
    """As `edits.activation_change`."""
    gain, offset, share, low, high = numbers
    change = offset + gain * f
    if share != 0:
        change += share * x_norm
    if f < low:
        change += low - f
    elif f > high:
        change += high - f
    return change


@numba.njit(
    "Tuple((f4[:, ::1], f4[:, ::1], b1[:, ::1]))(f4[:, ::1], f4[:, ::1], i8[::1], i8[::1], i4[:, ::1], f4[:, :, ::1], "
    "f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], b1)",
    nogil=True,
)
def _edit_rows(
    hidden, residual, rows, line, slot, numbers, encoder, bias, threshold, decoder, reads
):
    n_entries = slot.shape[1]
    change = np.empty((len(rows), n_entries), np.float32)
    x_norm = np.empty((len(rows), 1), np.float32)
    applied = np.empty((len(rows), 1), np.bool_)
    sums = np.empty(hidden.shape[1], np.float32)
    delta = np.empty_like(sums)
    for i in range(len(rows)):
        x = row = hidden[rows[i]]
        if len(residual):
            x = sums
            _sum(x, row, residual[rows[i]])
        x_norm[i, 0] = np.sqrt(_dot(x, x))
        moved, size = False, np.float32(0)
        for entry in range(n_entries):
            feature = slot[line[i], entry]
            f = np.float32(0)
            if reads:
                z = _dot(x, encoder[feature]) + bias[feature]
                f = np.float32(0) if z <= threshold[feature] else z
            change[i, entry] = _change(f, x_norm[i, 0], numbers[:, line[i], entry])
            if change[i, entry] != 0:
                if moved:
                    _add_scaled(delta, change[i, entry], decoder[feature])
                else:
                    _scale(delta, change[i, entry], decoder[feature])
                moved = True
        if moved:
            size = np.sqrt(_dot(delta, delta))
        applied[i, 0] = size <= np.float32(MAX_RELATIVE_SIZE) * x_norm[i, 0]
        if applied[i, 0] and moved:
            _sum(row, row, delta)
    return change, x_norm, applied
