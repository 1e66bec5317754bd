"""One generation from the API's side: hidden read-outs of watched features, metrics, updates, its end at a feature."""

import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from steer_server.api import calls
from steer_server.api.edits import op_of
from steer_server.api.presets import Presets
from steer_server.api.stopping import Stopper
from steer_server.api.uses import Held, Uses
from steer_server.api.watch import Watch
from steer_server.api.wire import ResolvedRequest, Served
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import DictionaryNotFound, EditNotApplied, InvalidRequest, WrongState
from steer_server.generation import (
    ActivationRows,
    Engine,
    Finish,
    FinishReason,
    Generation,
    RevisionApplied,
    StepOutput,
)
from steer_server.metrics import Metrics
from steer_server.program import FeatureEdit, Program, ReadOut
from steer_server.registry import Registry


class Generations:
    """Begins generations on behalf of every RPC."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        metrics: Metrics,
        watch: Mapping[str, Sequence[int]],
        presets: Presets | None = None,
    ) -> None:
        """`watch` lists the features whose activations become metrics, by dictionary."""
        self.engine = engine
        self.registry = registry
        self.metrics = metrics
        self.served = Served(engine, registry, presets or Presets())
        self.watch = Watch(metrics, registry, watch)
        self.uses = Uses()

    def dictionary(self, name: str) -> StoredDictionary:
        """The dictionary of a program that has been read; one on its way out is there for the calls that use it."""
        return self.uses.find(name) or self.registry.get(name)

    @contextmanager
    def using(self, programs: Iterable[Program]) -> Iterator[None]:
        """Within the block the names of the programs mean what they mean now, in one generation after another."""
        names = set[str]().union(*(program.dictionaries() for program in programs))
        with self.uses.hold({name: self.dictionary(name) for name in names}):
            yield

    def begin(
        self, rpc: str, request_id: str, request: ResolvedRequest, live: bool = False
    ) -> "Run":
        """The generation, not yet running; `rpc` names it in metrics. QuotaExceeded by the caller's tokens."""
        calls.check_tokens()
        return Run(self, rpc, request_id, request, live)

    def begin_all(self, rpc: str, request_id: str, request: ResolvedRequest) -> list["Run"]:
        """The request's sequences, each a generation of its own; a seed counts up over them, as in vLLM."""
        if request.n == 1:
            return [self.begin(rpc, request_id, request)]
        runs = []
        for number in range(request.n):
            sampling = request.sampling
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + number)
            one = replace(request, sampling=sampling, n=1)
            runs.append(self.begin(rpc, f"{request_id}:{number}", one))
        return runs


class Run:
    """A generation; iterate `outputs` once, and close it to abort."""

    def __init__(
        self,
        generations: Generations,
        rpc: str,
        request_id: str,
        request: ResolvedRequest,
        live: bool,
    ) -> None:
        self.request_id = request_id
        self.prompt_length = len(request.prompt_token_ids) - request.forced
        self.generated = 0
        self._engine = generations.engine
        self._metrics = generations.metrics
        self._watch = generations.watch
        self._generations = generations
        self._rpc = rpc
        self.cached_tokens = 0
        self.revision = 0
        """The one under which the last token was drawn."""
        self._coming: list[RevisionApplied] = []
        """Of revisions: told, but no token has been drawn under them."""
        watched = self._watch.read_outs()
        self._stopper = Stopper(
            request.stop_when, len(watched), self.prompt_length, self._engine.tokenizer
        )
        # First, so that their numbers stay the same whatever an update asks for.
        self._hidden = (*watched, *self._stopper.read_outs)
        self._watched = len(watched)
        program = self._with_hidden(request.program)
        self._dictionaries: Held = {}
        self.use(program)
        self._programs = {0: program}
        self._generated_tokens = self._metrics.tokens.labels("generated", self.steered)
        self._l0_program, self._l0_sources = program, _l0_sources(program)
        self._asked = program
        """Of the last update, whose revision is known only when the engine answers."""
        self._generation = Generation(
            request_id,
            request.prompt_token_ids,
            request.sampling,
            program,
            live,
            request.forced,
            calls.trace_headers() or {},
        )
        self._began = time.perf_counter()

    @property
    def steered(self) -> str:
        """As a label: whether any edit held or was to hold."""
        return "1" if any(program.edits for program in self._programs.values()) else "0"

    def edits(self, revision: int) -> tuple[FeatureEdit, ...]:
        """The edits of a revision; 0 is what the generation began with."""
        return self._of(revision).edits

    def read_outs(self, revision: int) -> tuple[ReadOut, ...]:
        """Those that were asked for in a revision."""
        return self._of(revision).read_outs[len(self._hidden) :]

    async def outputs(self) -> AsyncGenerator[StepOutput, None]:
        """The engine's outputs without the rows that nobody asked for."""
        # It may have been unloaded while the client took its time over the first response.
        for name, stored in self._dictionaries.items():
            if self._generations.dictionary(name) is not stored:
                raise DictionaryNotFound(f"dictionary {name!r} was unloaded", name=name)
        with self._generations.uses.hold(self._dictionaries):
            async with aclosing(self._outputs()) as outputs:
                async for output in outputs:
                    yield output

    async def _outputs(self) -> AsyncGenerator[StepOutput, None]:
        # Closing is part of the engine's contract; its return type leaves that out.
        steps = cast(AsyncGenerator[StepOutput, None], self._engine.generate(self._generation))
        reason = "abort"
        try:
            async with aclosing(steps):
                async for output in steps:
                    self._observe(output)
                    shown, stopped_by = self._stopper.cut(output)
                    self.generated = shown.first_index + len(shown.token_ids)
                    if stopped_by is not None:
                        shown = shown._replace(finish=self._stopped(output, stopped_by))
                    if shown.finish:
                        self._observe_reports(shown.finish)
                        reason = shown.finish.reason.value
                    yield self._without_hidden(shown)
                    if stopped_by is not None:
                        return
        except EditNotApplied:
            self._metrics.edit_not_applied.inc()
            reason = "error"
            raise
        except Exception:
            reason = "error"
            raise
        finally:
            self._metrics.requests.labels(self._rpc, self.steered, reason).inc()
            seconds = time.perf_counter() - self._began
            self._metrics.request_seconds.labels(self.steered).observe(seconds)

    def use(self, program: Program) -> None:
        """The dictionaries of a program that has just been read stay until the generation ends."""
        for name in program.dictionaries():
            self._dictionaries.setdefault(name, self._generations.dictionary(name))

    async def update(self, program: Program, at_index: int | None = None) -> int:
        """Replaces the program by one in `use` and returns its revision; WrongState if the generation has ended.

        It holds from the next token on, or from generated token `at_index`.
        """
        self._asked = program = self._with_hidden(program)
        with _running():
            revision = await self._engine.update(self.request_id, program, at_index)
        self._programs[revision] = program
        self._generated_tokens = self._metrics.tokens.labels("generated", self.steered)
        return revision

    async def pause(self) -> None:
        """No token is computed until `resume`; WrongState if the generation has ended."""
        with _running():
            await self._engine.pause(self.request_id)

    async def resume(self) -> None:
        """Goes on as if it had never paused."""
        with _running():
            await self._engine.resume(self.request_id)

    def _of(self, revision: int) -> Program:
        return self._programs.get(revision, self._asked)

    def _with_hidden(self, program: Program) -> Program:
        return replace(program, read_outs=(*self._hidden, *program.read_outs))

    def _without_hidden(self, output: StepOutput) -> StepOutput:
        hidden = len(self._hidden)
        if not (hidden and output.activations):
            return output
        shown = (rows for rows in output.activations if rows.read_out >= hidden)
        rows = tuple(rows._replace(read_out=rows.read_out - hidden) for rows in shown)
        return output._replace(activations=rows)

    def _stopped(self, output: StepOutput, stopped_by: int) -> Finish:
        """The end that the API makes of a generation which the engine would go on with."""
        if output.finish:
            reports, limited = output.finish.reports, output.finish.limited_tokens
        else:
            reports, limited = self._engine.so_far(self.request_id)
        return Finish(
            FinishReason.FEATURE,
            self.prompt_length,
            self.generated,
            self.cached_tokens,
            reports,
            limited,
            stopped_by,
        )

    def _observe(self, output: StepOutput) -> None:
        metrics = self._metrics
        if output.token_ids and not self.generated:
            metrics.tokens.labels("prompt", self.steered).inc(self.prompt_length)
            calls.count_tokens(self.prompt_length)
            waited = time.perf_counter() - self._began
            metrics.first_token_seconds.labels(self.steered).observe(waited)
        self._generated_tokens.inc(len(output.token_ids))
        calls.count_tokens(len(output.token_ids))
        self.cached_tokens = output.cached_tokens
        self._coming += output.applied
        if self._coming:
            last = output.first_index + len(output.token_ids) - 1
            begun = (entry.revision for entry in self._coming if entry.first_index <= last)
            self.revision = max(self.revision, *begun, 0)
            self._coming = [entry for entry in self._coming if entry.first_index > last]
        for name, seconds in output.encode_seconds.items():
            metrics.encode_seconds.labels(name).observe(seconds)
        if output.activations:
            self._observe_rows(output.activations)

    def _observe_rows(self, activations: Sequence[ActivationRows]) -> None:
        program = self._of(self.revision)
        if program is not self._l0_program:
            self._l0_program, self._l0_sources = program, _l0_sources(program)
        for rows in activations:
            if rows.read_out < self._watched:
                self._watch.observe(rows)
            if rows.active is not None:
                self._observe_active(rows, rows.active)

    def _observe_active(self, rows: ActivationRows, active: NDArray[np.uint32]) -> None:
        """Counts a row once, however many read-outs of its dictionary it is in."""
        # Positions ascend, and most often there is one.
        generated = rows.positions[0] >= self.prompt_length
        end = 0 if generated else int(rows.positions.searchsorted(self.prompt_length))
        for phase, part in (("prompt", active[:end]), ("generated", active[end:])):
            if len(part) and self._l0_sources.get((rows.dictionary, phase)) == rows.read_out:
                self._metrics.active_features.observe((rows.dictionary,), part)

    def _observe_reports(self, finish: Finish) -> None:
        for report in finish.reports:
            entry = self.edits(report.revision)[report.edit]
            changed = self._metrics.edit_tokens.labels(entry.dictionary, op_of(entry.edit))
            changed.inc(report.tokens_changed)
            if report.tokens_in_scope:
                self._metrics.edit_relative_size.observe(report.mean_relative_size)


@contextmanager
def _running() -> Iterator[None]:
    """What the engine refuses of a generation that has ended is the wrong time, not a wrong value.

    A wrong value has a field.
    """
    try:
        yield
    except InvalidRequest as error:
        if error.field:
            raise
        raise WrongState(f"the turn has ended: {error}") from error


def _l0_sources(program: Program) -> dict[tuple[str, str], int]:
    """By dictionary and phase: the first read-out at full width, whose rows are counted."""
    found: dict[tuple[str, str], int] = {}
    for index, read_out in enumerate(program.read_outs):
        for phase, holds in (("prompt", read_out.prompt), ("generated", read_out.generated)):
            if holds and read_out.top_k:
                found.setdefault((read_out.dictionary, phase), index)
    return found
