"""The front-end's account of one generation: what came back from the worker, and whether it is all there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from steer_server.errors import EditNotApplied, EditTooLarge
from steer_server.generation import EditReport, RevisionApplied
from steer_server.program import Program, Scope
from steer_server.vllm_plugin.plan import MAX_RELATIVE_SIZE
from steer_server.vllm_plugin.wire import EditTally, StepResult


@dataclass
class _Total:
    rows: int = 0
    changed: int = 0
    size: float = 0.0
    largest: float = 0.0


@dataclass
class Account:
    """Adds up the step results of one generation and closes with the proof that every edit ran."""

    prompt_length: int
    programs: list[Program]
    """By revision."""
    starts: list[int | None] = field(default_factory=lambda: [0])
    """By revision: the first position it held at, as the worker reported; None until then."""
    inbox: list[StepResult] = field(default_factory=list)
    _skipped: set[int] = field(default_factory=set)
    """Positions taken from the prefix cache."""
    _totals: dict[tuple[int, int], _Total] = field(default_factory=dict)

    def receive(self, results: Sequence[list[Any]]) -> None:
        """Takes in what came with a token; nothing is lost if the reader is slow."""
        self.inbox += [StepResult.from_wire(result) for result in results]

    def add_revision(self, program: Program) -> int:
        """An update is on its way to the worker; the revision it will be."""
        self.programs.append(program)
        self.starts.append(None)
        return len(self.programs) - 1

    def take(self) -> list[StepResult]:
        """What came since the last call, entered into the account. EditNotApplied if the worker says so."""
        results, self.inbox = self.inbox, []
        for result in results:
            if result.error:
                raise EditNotApplied(result.error)
            if result.too_large:
                raise EditTooLarge(
                    f"the edits would have moved x by more than {MAX_RELATIVE_SIZE:g} times its length, or "
                    "past the largest number of the model's dtype; use smaller strengths"
                )
            for start, stop in result.skipped:
                self._skipped |= set(range(start, stop))
            for revision, position in result.applied:
                self.starts[revision] = position
            for tally in result.tallies:
                self._enter(tally)
        return results

    def applied(self, results: Sequence[StepResult]) -> tuple[RevisionApplied, ...]:
        """The revisions that began to hold, by the first generated token drawn under them."""
        return tuple(
            RevisionApplied(revision, max(0, position + 1 - self.prompt_length))
            for result in results
            for revision, position in result.applied
        )

    def close(self, generated: int) -> tuple[EditReport, ...]:
        """One report per edit and revision that held; EditNotApplied if a row in scope was missed.

        Rows from the prefix cache are not computed anew; the last generated token is never read by the model.
        """
        last_row = self.prompt_length + generated - 1
        held = [revision for revision, start in enumerate(self.starts) if start is not None]
        reports = []
        for revision, following in zip(held, [*held[1:], None], strict=True):
            first = self.starts[revision] or 0
            stop = last_row if following is None else min(last_row, self.starts[following] or 0)
            edits = self.programs[revision].edits
            expected = {
                scope: self._rows_in_scope(scope, first, stop)
                for scope in {entry.scope for entry in edits}
            }
            for index, entry in enumerate(edits):
                report = self._report(revision, index)
                if report.tokens_in_scope < expected[entry.scope]:
                    raise EditNotApplied(
                        f"edit {index} of revision {revision} ran on {report.tokens_in_scope} tokens, "
                        f"its scope holds {expected[entry.scope]}"
                    )
                reports.append(report)
        return tuple(reports)

    def _rows_in_scope(self, scope: Scope, first: int, stop: int) -> int:
        return sum(
            scope.holds(position, self.prompt_length)
            for position in range(first, stop)
            if position not in self._skipped
        )

    def _enter(self, tally: EditTally) -> None:
        for place, index in enumerate(tally.edits.tolist()):
            total = self._totals.setdefault((tally.revision, index), _Total())
            total.rows += tally.rows
            total.changed += int(tally.changed[place])
            total.size += float(tally.total_size[place])
            total.largest = max(total.largest, float(tally.max_size[place]))

    def _report(self, revision: int, index: int) -> EditReport:
        total = self._totals.get((revision, index), _Total())
        mean = total.size / total.rows if total.rows else 0.0
        return EditReport(revision, index, total.rows, total.changed, mean, total.largest)
