"""What edits did, as it comes in with each step; added up over many steps before anyone asks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steer_server.vllm_plugin.report import (
    EditBlock,
    EditRows,
    EditRuns,
    StepReport,
    relative_size,
)

_STEPS_AT_ONCE = 64


class EditTally(NamedTuple):
    """What edits of one revision did on `rows` rows, all in their scope; the others align with `edits`."""

    revision: int
    rows: int
    edits: list[int]
    changed: list[int]
    """As in `EditBlock`, as are the others."""
    total_size: list[float]
    max_size: list[float]


_Sums = tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.float32]]
"""The last three of an `EditTally`, of all requests."""


class Ledger:
    """A step of a batch that decodes is like the one before: they are added up as wholes, and split among requests seldom."""

    def __init__(self, hand_over: Callable[[str, EditTally], None]) -> None:
        """`hand_over` gets each tally with vLLM's id of the request."""
        self._hand_over = hand_over
        self._steps: list[StepReport] = []

    def enter(self, report: StepReport) -> None:
        if report.edits or report.edit_rows:
            self._steps.append(report)
        if len(self._steps) >= _STEPS_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Hands over all that came in."""
        if not self._steps:
            return
        blocks: dict[tuple[tuple[str, ...], bytes], list[EditBlock]] = {}
        rows: dict[tuple[tuple[str, ...], bytes, bytes], list[EditRows]] = {}
        for report in self._steps:
            requests = tuple(report.requests)
            for block in report.edits:
                blocks.setdefault((requests, block.runs), []).append(block)
            for row in report.edit_rows:
                rows.setdefault((requests, row.runs, row.decoder_norm), []).append(row)
        self._steps.clear()
        for (requests, runs), alike in blocks.items():
            self._split(requests, EditRuns.unpack(runs), len(alike), _of_blocks(alike))
        for (requests, runs, _), found in rows.items():
            self._split(requests, EditRuns.unpack(runs), len(found), _of_rows(found))

    def _split(self, requests: tuple[str, ...], runs: EditRuns, steps: int, sums: _Sums) -> None:
        """`sums` are of so many steps of the same requests and runs."""
        # A request has few edits: lists of them take less than arrays.
        edits, changed, total, largest = (numbers.tolist() for numbers in (runs.edit, *sums))
        end = 0
        for request, revision, rows, entries in zip(*(a.tolist() for a in runs[:4]), strict=True):
            part = slice(end, end := end + entries)
            tally = EditTally(
                revision, rows * steps, edits[part], changed[part], total[part], largest[part]
            )
            self._hand_over(requests[request], tally)


def _of_blocks(blocks: Sequence[EditBlock]) -> _Sums:
    _, changed, total, largest = zip(*blocks, strict=True)
    return (
        _stacked(changed, np.uint32).sum(axis=0, dtype=np.uint32),
        _stacked(total, np.float32).sum(axis=0, dtype=np.float64),
        _stacked(largest, np.float32).max(axis=0),
    )


def _of_rows(rows: Sequence[EditRows]) -> _Sums:
    _, norms, changes, x_norms = zip(*rows, strict=True)
    change, x_norm = _stacked(changes, np.float32), _stacked(x_norms, np.float32)
    edits = change.shape[1] // x_norm.shape[1]
    decoder_norm = np.frombuffer(norms[0], np.float32)
    size = relative_size(change, x_norm.repeat(edits, axis=1), decoder_norm)
    changed = (change != 0).sum(axis=0, dtype=np.uint32)
    return changed, size.sum(axis=0, dtype=np.float64), size.max(axis=0)


def _stacked(parts: Sequence[bytes], dtype: type[np.generic]) -> NDArray[Any]:
    """[steps, entries]."""
    return np.frombuffer(b"".join(parts), dtype).reshape(len(parts), -1)
