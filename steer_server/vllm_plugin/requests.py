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
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """Runs of positions that this step found in the prefix cache, so that nobody computes them."""
    _cuts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cut_at({self.prompt_length, *_cuts_of(self.programs[0])})

    def begin(self, start: int) -> None:
        """A step computes this request's rows from `start` on: waiting updates take hold here.

        They hold from the first position never computed before, wherever a recompute begins.
        """
        if start > self.done:
            self.skipped.append((self.done, start))
            self.done = start
        position = self.done
        for program in self.waiting:
            self.programs.append(program)
            self.starts.append(position)
            self.announced.append(RevisionStart(len(self.starts) - 1, position))
            self._cut_at({position, *_cuts_of(program)})
        self.waiting.clear()

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The rows [start, stop) cut where edits change."""
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

    def _cut_at(self, positions: set[int]) -> None:
        self._cuts = sorted({*self._cuts, *positions})

    def _edits_at(self, position: int, revision: int) -> tuple[int, ...]:
        return tuple(
            index
            for index, edit in enumerate(self.programs[revision].edits)
            if edit.scope.holds(position, self.prompt_length)
        )


def _cuts_of(program: WorkerProgram) -> set[int]:
    """Where the edits of the program begin or cease to hold, but for the end of the prompt."""
    scopes = {edit.scope for edit in program.edits}
    excluded = {position for scope in scopes for position in scope.exclude_positions}
    return excluded | {position + 1 for position in excluded}
