"""What a worker knows of each running request with a program."""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from steer_server.vllm_plugin.wire import RevisionStart, WorkerProgram


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

    name: str
    """The front-end's id; vLLM's own carries a random suffix."""
    prompt_length: int
    programs: list[WorkerProgram]
    """By revision."""
    starts: list[int] = field(default_factory=lambda: [0])
    """By revision: its first position; equal to its successor's if it never held."""
    done: int = 0
    """Rows below this position have been computed, counted and reported."""
    waiting: list[WorkerProgram] = field(default_factory=list)
    """Updates that came since the last step."""
    announced: list[RevisionStart] = field(default_factory=list)
    """Revisions that began to hold in this step."""
    _cuts: list[int] | None = None

    def begin(self, start: int) -> None:
        """A step computes this request's rows from `start` on: waiting updates take hold here.

        They hold from the first position never computed before, wherever a recompute begins.
        """
        position = max(start, self.done)
        for program in self.waiting:
            self.programs.append(program)
            self.starts.append(position)
            self.announced.append(RevisionStart(len(self.starts) - 1, position))
            self._cuts = None
        self.waiting.clear()

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The rows [start, stop) cut where edits change."""
        if self._cuts is None:
            self._cuts = self._find_cuts()
        cuts = self._cuts
        found = []
        position = start
        while position < stop:
            next_cut = bisect_right(cuts, position)
            end = min(stop, cuts[next_cut]) if next_cut < len(cuts) else stop
            revision = bisect_right(self.starts, position) - 1
            found.append(Segment(position, end, revision, self._edits_at(position, revision)))
            position = end
        return found

    def _find_cuts(self) -> list[int]:
        cuts = {self.prompt_length, *self.starts}
        for program in self.programs:
            for edit in program.edits:
                for position in edit.scope.exclude_positions:
                    cuts |= {position, position + 1}
        return sorted(cuts)

    def _edits_at(self, position: int, revision: int) -> tuple[int, ...]:
        return tuple(
            index
            for index, edit in enumerate(self.programs[revision].edits)
            if edit.scope.holds(position, self.prompt_length)
        )
