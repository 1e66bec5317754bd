"""What edits did, as it comes in with each step; added up over many steps before anyone asks."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steer_server.vllm_plugin.report import EditBlock, EditRuns, StepReport

_STEPS_AT_ONCE = 64


class EditTally(NamedTuple):
    """What edits of one revision did on `rows` rows, all in their scope; arrays align with `edits`."""

    revision: int
    rows: int
    edits: NDArray[np.int32]
    changed: NDArray[np.uint32]
    """As in `EditBlock`, as are the others."""
    total_size: NDArray[np.float64]
    max_size: NDArray[np.float32]


class Ledger:
    """A step of a batch that decodes is like the one before: they are added up as wholes, and split among requests seldom."""

    def __init__(self, hand_over: Callable[[str, EditTally], None]) -> None:
        """`hand_over` gets each tally with vLLM's id of the request."""
        self._hand_over = hand_over
        self._steps: list[StepReport] = []

    def enter(self, report: StepReport) -> None:
        if report.edits:
            self._steps.append(report)
        if len(self._steps) >= _STEPS_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Hands over all that came in."""
        alike: dict[tuple[bytes, tuple[str, ...]], list[EditBlock]] = {}
        for report in self._steps:
            requests = tuple(report.requests)
            for block in report.edits:
                alike.setdefault((block.runs, requests), []).append(block)
        self._steps.clear()
        for (_, requests), blocks in alike.items():
            self._split(requests, blocks)

    def _split(self, requests: tuple[str, ...], blocks: list[EditBlock]) -> None:
        """Blocks of the same requests and runs."""
        runs = EditRuns.unpack(blocks[0].runs)
        changed = np.stack([block.changed for block in blocks]).sum(axis=0, dtype=np.uint32)
        total = np.stack([block.total_size for block in blocks]).sum(axis=0, dtype=np.float64)
        largest = np.stack([block.max_size for block in blocks]).max(axis=0)
        end = 0
        for request, revision, rows, entries in zip(*(a.tolist() for a in runs[:4]), strict=True):
            part = slice(end, end := end + entries)
            numbers = runs.edit[part], changed[part], total[part], largest[part]
            self._hand_over(requests[request], EditTally(revision, rows * len(blocks), *numbers))
