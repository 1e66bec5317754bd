"""The front-end's account of one generation: what came back from the worker, and whether it is all there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer_server.errors import EditNotApplied, EditTooLarge, SteerError
from steer_server.generation import EditReport, RevisionApplied
from steer_server.program import Program
from steer_server.vllm_plugin.ledger import EditTally
from steer_server.vllm_plugin.report import StepResult


@dataclass(slots=True)
class _Total:
    """Of one edit of a revision."""

    rows: int = 0
    changed: int = 0
    size: float = 0.0
    largest: float = 0.0


@dataclass(eq=False)
class Account:
    """Adds up the step results of one generation and closes with the proof that every edit ran."""

    prompt_token_ids: Sequence[int]
    programs: list[Program]
    """By revision, resolved."""
    starts: list[int | None] = field(default_factory=lambda: [0])
    """By revision: the first position it held at, as the worker reported; None until then."""
    token_ids: list[int] = field(default_factory=list)
    """Generated so far, or forced."""
    limited_tokens: int = 0
    """Past their program's limit so far, summed over sites."""
    wants_distribution: bool = False
    distribution: Any = None
    """vLLM's LogprobsLists of the one token generated."""
    ended: bool = False
    """vLLM is done with it; nothing more comes in."""
    settle: Callable[[], None] = lambda: None
    """Makes the ledger hand over what it has."""
    _skipped: list[tuple[int, int]] = field(default_factory=list)
    """Runs of positions taken from the prefix cache."""
    _distrusted: tuple[int, SteerError] | None = None
    """If the row at this position, or one behind it, is from there, this generation fails with the error."""
    _failed: SteerError | None = None
    """What it has failed with; from then on nothing else comes of it."""
    _result: StepResult | None = None
    _totals: dict[int, list[_Total]] = field(default_factory=dict)
    """By revision, then by edit."""

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_token_ids)

    def add_revision(self, program: Program) -> int:
        """An update is on its way to the worker; the revision it will be."""
        self.programs.append(program)
        self.starts.append(None)
        return len(self.programs) - 1

    @property
    def result(self) -> StepResult:
        """What comes in until the next `take`."""
        if self._result is None:
            self._result = StepResult()
        return self._result

    def tokens(self, first: int, stop: int) -> list[int]:
        """The ids at positions [first, stop), as far as they are known."""
        if stop <= self.prompt_length:
            return list(self.prompt_token_ids[first:stop])
        return [*self.prompt_token_ids, *self.token_ids][first:stop]

    def distrust(self, position: int, error: SteerError) -> None:
        """Another request with the same edits and the same tokens so far failed at `position`, where this one would, too,
        if it did not take that row from the prefix cache."""
        if self._distrusted is None or position < self._distrusted[0]:
            self._distrusted = position, error

    def take(self) -> StepResult | None:
        """What came since the last call, entered into the account.

        EditNotApplied or EditTooLarge if the worker says so, of this request or of one whose row it took from the cache.
        """
        result, self._result = self._result, None
        if result is not None:
            self._skipped += result.skipped
            if result.error:
                self._failed = self._failed or EditNotApplied(result.error)
            elif result.too_large:
                self._failed = self._failed or EditTooLarge(result.too_large)
            self.limited_tokens += result.limited
            for revision, position in result.applied:
                self.starts[revision] = position
        self._check()
        return result

    def enter(self, tally: EditTally) -> None:
        """What edits did, as the ledger hands it over."""
        totals = self._of(tally.revision)
        numbers = zip(tally.edits, tally.changed, tally.total_size, tally.max_size, strict=True)
        for edit, changed, size, largest in numbers:
            total = totals[edit]
            total.rows += tally.rows
            total.changed += changed
            total.size += size
            total.largest = max(total.largest, largest)

    def applied(self, result: StepResult) -> tuple[RevisionApplied, ...]:
        """The revisions that began to hold, by the first generated token drawn under them."""
        return tuple(
            RevisionApplied(revision, max(0, position + 1 - self.prompt_length), position)
            for revision, position in result.applied
        )

    def close(self) -> tuple[EditReport, ...]:
        """One report per edit and revision that held; EditNotApplied if a row in scope was missed.

        Rows from the prefix cache are not computed anew; the last generated token is never read by the model.
        """
        self.settle()
        self._check()
        last_row = self.prompt_length + len(self.token_ids) - 1
        held = [revision for revision, start in enumerate(self.starts) if start is not None]
        reports = []
        for revision, following in zip(held, [*held[1:], None], strict=True):
            if not self.programs[revision].edits:
                continue
            first = self.starts[revision] or 0
            stop = last_row if following is None else min(last_row, self.starts[following] or 0)
            expected = self._expected(revision, first, stop)
            found = self._of(revision)
            for index, (rows, total) in enumerate(zip(expected, found, strict=True)):
                if total.rows < rows:
                    raise EditNotApplied(
                        f"edit {index} of revision {revision} ran on {total.rows} tokens, its scope holds {rows}"
                    )
                mean = total.size / max(total.rows, 1)
                reports.append(
                    EditReport(revision, index, total.rows, total.changed, mean, total.largest)
                )
        return tuple(reports)

    def _expected(self, revision: int, first: int, stop: int) -> list[int]:
        """Rows in scope of each edit among the computed ones of [first, stop)."""
        program = self.programs[revision]
        ids = self.tokens(first, stop) if program.reads_tokens else ()
        expected = [0] * len(program.edits)
        for where, indices in program.groups.items():
            runs = where.runs(first, max(first, stop), self.prompt_length, ids)
            rows = sum(map(self._computed, runs))
            for index in indices:
                expected[index] = rows
        return expected

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed
        if self._distrusted is not None:
            position, error = self._distrusted
            if any(stop > position for _, stop in self._skipped):
                raise type(error)(str(error))

    def _computed(self, run: tuple[int, int]) -> int:
        """How many positions of [first, last) the prefix cache did not hold."""
        first, last = run
        cached = (max(0, min(last, end) - max(first, start)) for start, end in self._skipped)
        return last - first - sum(cached)

    def _of(self, revision: int) -> list[_Total]:
        if revision not in self._totals:
            self._totals[revision] = [_Total() for _ in self.programs[revision].edits]
        return self._totals[revision]
