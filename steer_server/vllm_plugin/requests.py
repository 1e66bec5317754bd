"""What a worker knows of each running request with a program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

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
    waiting: list[tuple[Program, int]] = field(default_factory=list)
    """Updates that came since the last step, each with the first position it may hold at."""

    def names(self, dictionary: str) -> bool:
        """Whether any of its programs names the dictionary."""
        programs = (*self.programs, *(program for program, _ in self.waiting))
        return any(dictionary in program.dictionaries() for program in programs)

    def begin(self, start: int) -> tuple[list[RevisionStart], list[tuple[int, int]]]:
        """A step computes this request's rows from `start` on: waiting updates take hold in it.

        They hold from the first position never computed before, wherever a recompute begins, or from the one they
        name behind it. Returns the revisions that begin, and the run of positions that the prefix cache holds so that
        nobody computes them.
        """
        skipped = [(self.done, start)] if start > self.done else []
        self.done = max(self.done, start)
        if not self.waiting:
            return [], skipped
        # One that would begin behind a later one never holds.
        firsts = [max(self.done, first) for _, first in reversed(self.waiting)]
        starts = list(accumulate(firsts, min))[::-1]
        begun = [RevisionStart(len(self.starts) + i, start) for i, start in enumerate(starts)]
        self.programs += [program for program, _ in self.waiting]
        self.starts += starts
        self.waiting.clear()
        return begun, skipped

    def revisions(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(revision, first, last) of the runs of [start, stop) on which one holds."""
        if len(self.starts) == 1:
            return [(0, start, stop)] if start < stop else []
        found = []
        ends = [*self.starts[1:], FOREVER]
        for revision, (begin, end) in enumerate(zip(self.starts, ends, strict=True)):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found.append((revision, first, last))
        return found

    def segments(self, start: int, stop: int, tokens: Tokens) -> list[Segment]:
        """The rows [start, stop) cut where edits change; those of programs without edits are left out."""
        found = []
        for revision, first, last in self.revisions(start, stop):
            if self.programs[revision].edits:
                found += self._cut(revision, first, last, tokens)
        return found

    def steady_until(self, position: int) -> int:
        """The first position after `position` where other edits or read-outs hold, by the last revision."""
        program = self.programs[-1]
        if program.reads_tokens:
            return position + 1
        edges = {self.prompt_length, *program.edges}
        return min((edge for edge in edges if edge > position), default=FOREVER)

    def _cut(self, revision: int, start: int, stop: int, tokens: Tokens) -> list[Segment]:
        program = self.programs[revision]
        if program.reads_tokens:
            cuts, ids = range(start, stop + 1), tokens(start, stop)
        else:
            edges = {self.prompt_length, *program.edges}
            cuts = sorted({start, stop, *(edge for edge in edges if start < edge < stop)})
            ids = (-1,) * (stop - start)
        found: list[Segment] = []
        for first, last in pairwise(cuts):
            token = ids[first - start]
            held = [
                indices
                for where, indices in program.groups.items()
                if where.holds(first, self.prompt_length, token)
            ]
            edits = tuple(sorted(chain(*held)))
            if found and found[-1].edits == edits and not program.patches:
                found[-1] = found[-1]._replace(stop=last)
            else:
                found.append(Segment(first, last, revision, edits))
        return found
