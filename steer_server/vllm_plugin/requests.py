"""What a worker knows of each running request with a program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steer_server.dictionary.edits import Patch
from steer_server.program import Program
from steer_server.vllm_plugin.report import RevisionStart

Tokens = Callable[[int, int], Sequence[int]]
"""The ids of a request's tokens at positions [start, stop)."""

FOREVER = 2**62


class Segment(NamedTuple):
    """A run of positions on which the same edits hold."""

    start: int
    stop: int
    revision: int
    edits: tuple[int, ...]
    """Indices into that revision's edits."""


@dataclass
class RequestState:
    """One request: its programs, each from the position where it began to hold.

    Preemption recomputes old positions; each replays the revision that held there, so the log is kept whole.
    """

    prompt_length: int
    programs: list[Program]
    """By revision, resolved."""
    starts: list[int] = field(default_factory=lambda: [0])
    """By revision: its first position; equal to its successor's if it never held."""
    done: int = 0
    """Rows below this position have been computed, counted and reported."""
    waiting: list[Program] = field(default_factory=list)
    """Updates that came since the last step."""

    def begin(self, start: int) -> tuple[list[RevisionStart], list[tuple[int, int]]]:
        """A step computes this request's rows from `start` on: waiting updates take hold here.

        They hold from the first position never computed before, wherever a recompute begins. Returns the revisions
        that begin, and the run of positions that the prefix cache holds so that nobody computes them.
        """
        skipped = [(self.done, start)] if start > self.done else []
        self.done = max(self.done, start)
        begun = []
        for program in self.waiting:
            self.programs.append(program)
            self.starts.append(self.done)
            begun.append(RevisionStart(len(self.starts) - 1, self.done))
        self.waiting.clear()
        return begun, skipped

    def segments(self, start: int, stop: int, tokens: Tokens) -> list[Segment]:
        """The rows [start, stop) cut where edits change."""
        found = []
        ends = [*self.starts[1:], FOREVER]
        for revision, (begin, end) in enumerate(zip(self.starts, ends, strict=True)):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found += self._cut(revision, first, last, tokens)
        return found

    def steady_until(self, position: int) -> int:
        """The first position after `position` where other edits or read-outs hold, by the last revision."""
        program = self.programs[-1]
        if any(entry.scope.reads_tokens for entry in program.edits):
            return position + 1
        edges = {self.prompt_length}.union(*(entry.edges() for entry in program.edits))
        return min((edge for edge in edges if edge > position), default=FOREVER)

    def _cut(self, revision: int, start: int, stop: int, tokens: Tokens) -> list[Segment]:
        edits = self.programs[revision].edits
        reads = any(entry.scope.reads_tokens for entry in edits)
        ids = tokens(start, stop) if reads else ()
        # Most edits of a program share their scope, and a mask costs more than a look-up.
        masks: dict[object, NDArray[np.bool_]] = {}
        rows = []
        cuts = {start, stop}
        for entry in edits:
            patched = entry.edit if isinstance(entry.edit, Patch) else None
            key = (entry.scope, patched)
            if key not in masks:
                masks[key] = entry.mask(start, stop, self.prompt_length, ids)
                cuts |= set((np.flatnonzero(np.diff(masks[key])) + start + 1).tolist())
            if patched:
                cuts |= {edge for edge in entry.edges() if start < edge < stop}
            rows.append(masks[key])
        return [
            Segment(a, b, revision, tuple(i for i, row in enumerate(rows) if row[a - start]))
            for a, b in pairwise(sorted(cuts))
        ]
