"""Runs the requests of a random case at once and holds each against the reference."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from steer_server.engine import VllmEngine
from steer_server.errors import InvalidRequest
from steer_server.generation import Generation, RevisionApplied, Sampling, StepOutput
from steer_server.program import Program, ReadOut
from steer_server.vllm_plugin.account import Account
from tests.e2e.helpers import Outcome
from tests.e2e.multi_reference import CLOSE, Answer, Held, MultiReference, activations
from tests.e2e.random_programs import Job

TOLERANCE = 1e-4
"""Of log-probabilities."""


@dataclass
class Result(Outcome):
    """What came of a job."""

    programs: list[Program] = field(default_factory=list)
    """By revision."""
    account: Account | None = None
    ended: bool = False


async def run_case(engine: VllmEngine, jobs: Sequence[Job]) -> list[Result]:
    """By job; all have ended before the first failure is raised."""
    found = await asyncio.gather(*(run_job(engine, job) for job in jobs), return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return [result for result in found if isinstance(result, Result)]


async def run_job(engine: VllmEngine, job: Job) -> Result:
    await asyncio.sleep(job.pause)
    sampling = Sampling(max_tokens=job.tokens, temperature=0.0, ignore_eos=True, logprobs=True)
    generation = Generation(job.name, job.prompt, sampling, job.program, job.live)
    result = Result(programs=[job.program])
    progress = asyncio.Condition()
    stream = engine.generate(generation)
    pending = asyncio.ensure_future(anext(stream))
    sender = asyncio.gather(
        _send_updates(engine, job, result, progress), _pause(engine, job, result, progress)
    )
    try:
        while result.finish is None:
            _enter(result, await pending)
            result.account = result.account or engine._accounts.get(job.name)
            async with progress:
                progress.notify_all()
            if job.abort_after is not None and len(result.token_ids) >= job.abort_after:
                break
            if result.finish is None:
                pending = asyncio.ensure_future(anext(stream))
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
        result.ended = True
        async with progress:
            progress.notify_all()
    await sender
    return result


async def _send_updates(
    engine: VllmEngine, job: Job, result: Result, progress: asyncio.Condition
) -> None:
    """An update may be too late; otherwise it has the next revision."""
    for update in job.updates:
        async with progress:
            await progress.wait_for(
                lambda seen=update.seen: result.ended or len(result.token_ids) >= seen
            )
        await asyncio.sleep(update.delay)
        (answer,) = await asyncio.gather(
            engine.update(job.name, update.program, update.at_index), return_exceptions=True
        )
        if isinstance(answer, InvalidRequest):
            assert "not live" in str(answer)
            return
        assert answer == len(result.programs)
        result.programs.append(update.program)


async def _pause(engine: VllmEngine, job: Job, result: Result, progress: asyncio.Condition) -> None:
    """A request that ends meanwhile cannot go on."""
    if job.paused is None:
        return
    seen, seconds = job.paused
    async with progress:
        await progress.wait_for(lambda: result.ended or len(result.token_ids) >= seen)
    with suppress(InvalidRequest):
        await engine.pause(job.name)
        await asyncio.sleep(seconds)
        await engine.resume(job.name)


def _enter(result: Result, step: StepOutput) -> None:
    assert step.first_index == len(result.token_ids)
    result.token_ids += step.token_ids
    result.logprobs += step.logprobs
    result.rows += step.activations
    result.applied += step.applied
    result.finish = step.finish


def check(job: Job, result: Result, reference: MultiReference) -> None:
    """AssertionError says what differs from the reference."""
    if job.abort_after is not None and result.finish is None:
        return
    assert result.finish is not None
    assert len(result.token_ids) == len(result.logprobs) == job.tokens
    held = _held(job, result)
    answer = reference.ask(job.prompt, result.token_ids, [part for _, part in held])
    # Token t is drawn from row prompt + t - 1. Behind a decision that hangs on rounding there is nothing to compare.
    drawn = max(0, answer.settled - len(job.prompt) + 1)
    if answer.settled < len(job.prompt) + job.tokens - 1:
        print(f"{job.name}: rounding decides an edit at row {answer.settled}")
    difference = (torch.tensor(result.logprobs) - answer.logprobs).abs()[:drawn]
    assert (difference < TOLERANCE).all(), f"{job.name}: off by {difference.max()}, {difference}"
    above = (answer.best - answer.logprobs)[:drawn]
    assert (above < TOLERANCE).all(), f"{job.name}: a token is not the likeliest, {above}"
    if answer.settled < len(job.prompt) + job.tokens - 1:
        return
    computed = _computed(job, result)
    _check_reports(result, held, answer, computed)
    assert result.finish.limited_tokens == sum(int(computed[row]) for row in answer.limited)
    _check_rows(job, result, held, answer, computed, reference)


def _held(job: Job, result: Result) -> list[tuple[int, Held]]:
    """(revision, where it held), as the acknowledgements say."""
    rows = len(job.prompt) + job.tokens - 1
    if result.account is None:
        assert job.program == Program()
        assert not job.live
        return [(0, Held(job.program, 0, rows))]
    revisions = [entry.revision for entry in result.applied]
    assert revisions == list(range(1, len(revisions) + 1))
    # An index of 0 leaves open where in the prompt; the account knows.
    starts = [start for start in result.account.starts if start is not None]
    assert starts == sorted(starts)
    assert len(starts) == len(revisions) + 1
    begun = pairwise([*starts, rows])
    next(begun)
    for (revision, index), (start, end) in zip(map(_pair, result.applied), begun, strict=True):
        assert index == max(0, start + 1 - len(job.prompt)), f"revision {revision}"
        assert 0 <= index < job.tokens
        update = job.updates[revision - 1]
        assert index >= update.seen
        # One that another has replaced holds nowhere, so it may be told of before its time.
        assert index >= (update.at_index or 0) or start == end
    ends = [*starts[1:], rows]
    return [
        (revision, Held(result.programs[revision], start, end))
        for revision, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _pair(entry: RevisionApplied) -> tuple[int, int]:
    return entry.revision, entry.first_index


def _computed(job: Job, result: Result) -> np.ndarray:
    """Which positions were not taken from the prefix cache."""
    computed = np.ones(len(job.prompt) + job.tokens - 1, bool)
    for start, end in result.account._skipped if result.account else ():
        assert not job.live
        computed[start:end] = False
    return computed


def _check_reports(
    result: Result, held: Sequence[tuple[int, Held]], answer: Answer, computed: np.ndarray
) -> None:
    assert result.finish is not None
    expected = [(r, index) for r, part in held for index in range(len(part.program.edits))]
    assert [(report.revision, report.edit) for report in result.finish.reports] == expected
    for report in result.finish.reports:
        edit = result.programs[report.revision].edits[report.edit]
        what = f"revision {report.revision}, {edit}"
        tally = answer.tallies[report.revision, report.edit]
        here = [i for i, row in enumerate(tally.rows) if computed[row]]
        assert report.tokens_in_scope == len(here), what
        if len(here) == len(tally.rows):
            assert abs(report.tokens_changed - tally.changed) <= tally.close, what
        if here and not tally.close:
            sizes = [tally.sizes[i] for i in here]
            assert np.isclose(report.mean_relative_size, np.mean(sizes), rtol=1e-3, atol=1e-5), what
            assert np.isclose(report.max_relative_size, max(sizes), rtol=1e-3, atol=1e-5), what


def _check_rows(
    job: Job,
    result: Result,
    held: Sequence[tuple[int, Held]],
    answer: Answer,
    computed: np.ndarray,
    reference: MultiReference,
) -> None:
    """Every row of every read-out once, under the revision of its position, with the reference's values."""
    expected = set()
    encoded: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
    revision_at = np.zeros(len(computed), int)
    for revision, part in held:
        revision_at[part.start : part.stop] = revision
        for number, spec in enumerate(part.program.read_outs):
            for p in range(part.start, part.stop):
                wanted = spec.prompt if p < len(job.prompt) else spec.generated
                if wanted and computed[p]:
                    expected.add((number, p))
            x = (answer.after if spec.edited else answer.before)[_site(reference, spec)]
            dictionary = reference.dictionaries[spec.dictionary].dictionary
            encoded[spec.dictionary, spec.edited] = activations(dictionary, x)
    seen = set()
    for rows in result.rows:
        for i, p in enumerate(rows.positions.tolist()):
            assert (rows.read_out, p) not in seen, f"read-out {rows.read_out} twice at {p}"
            seen.add((rows.read_out, p))
            spec = result.programs[revision_at[p]].read_outs[rows.read_out]
            assert rows.dictionary == spec.dictionary
            f, close = (t[p] for t in encoded[spec.dictionary, spec.edited])
            part = slice(rows.row_splits[i], rows.row_splits[i + 1])
            what = f"{spec} at {p}"
            _check_row(spec, rows.features[part], rows.values[part], f, close, what)
            if rows.active is not None:
                count = int(torch.count_nonzero(f))
                assert abs(int(rows.active[i]) - count) <= int(close.sum()), what
    assert seen == expected


def _site(reference: MultiReference, spec: ReadOut):
    return reference.dictionaries[spec.dictionary].card.site


def _check_row(
    spec: ReadOut,
    features: np.ndarray,
    values: np.ndarray,
    f: Tensor,
    close: Tensor,
    what: str,
) -> None:
    listed = features.tolist()
    assert len(set(listed)) == len(listed), what
    index = torch.tensor(listed, dtype=torch.int64)
    difference = (torch.from_numpy(values.copy()) - f[index]).abs()
    assert (difference[~close[index]] < CLOSE).all(), f"{what}: {difference.max()}"
    sizes = np.abs(values)
    if spec.features:
        unlisted = set(spec.features) - set(listed)
        assert listed == [feature for feature in spec.features if feature not in unlisted], what
        floor = 0.0
    else:
        assert (np.diff(sizes) <= 0).all(), what
        assert len(listed) <= spec.limit, what
        unlisted = set(range(len(f))) - set(listed)
        least = spec.above or 0.0
        assert (sizes > least).all(), what
        # Full: only weaker ones are left out. Else: only those that do not exceed the value.
        floor = max(least, float(sizes.min())) if len(listed) == spec.limit else least
    rest = torch.tensor(sorted(unlisted), dtype=torch.int64)
    rest = rest[~close[rest]]
    assert (f[rest].abs() <= floor + CLOSE).all(), f"{what}: one is missing"
