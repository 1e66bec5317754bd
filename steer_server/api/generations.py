"""One generation from the API's side: hidden read-outs of watched features, metrics, updates."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from steer_server.api.edits import op_of
from steer_server.api.uses import Uses
from steer_server.api.watch import Watch
from steer_server.api.wire import ResolvedRequest
from steer_server.errors import DictionaryNotFound, EditNotApplied, InvalidRequest, WrongState
from steer_server.generation import ActivationRows, Engine, Finish, Generation, StepOutput
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
    ) -> None:
        """`watch` lists the features whose activations become metrics, by dictionary."""
        self.engine = engine
        self.registry = registry
        self.metrics = metrics
        self.watch = Watch(metrics, registry, watch)
        self.uses = Uses()

    def begin(
        self, rpc: str, request_id: str, request: ResolvedRequest, live: bool = False
    ) -> "Run":
        """The generation, not yet running; `rpc` names it in metrics."""
        return Run(self, rpc, request_id, request, live)


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
        self.prompt_length = len(request.prompt_token_ids)
        self.generated = 0
        self._engine = generations.engine
        self._metrics = generations.metrics
        self._watch = generations.watch
        self._registry = generations.registry
        self._uses = generations.uses
        self._rpc = rpc
        self._visible = len(request.program.read_outs)
        hidden = self._watch.read_outs()
        program = replace(request.program, read_outs=(*request.program.read_outs, *hidden))
        self._dictionaries = {name: self._registry.get(name) for name in program.dictionaries()}
        self._use = set(self._dictionaries)
        self._programs = {0: program}
        self._asked = program
        """Of the last update, whose revision is known only when the engine answers."""
        self._l0_sources = _l0_sources(program.read_outs)
        self._generation = Generation(
            request_id, request.prompt_token_ids, request.sampling, program, live
        )
        self._began = time.perf_counter()

    @property
    def steered(self) -> str:
        """As a label: whether any edit held or was to hold."""
        return "1" if any(program.edits for program in self._programs.values()) else "0"

    def edits(self, revision: int) -> tuple[FeatureEdit, ...]:
        """The edits of a revision; 0 is what the generation began with."""
        return self._programs.get(revision, self._asked).edits

    async def outputs(self) -> AsyncGenerator[StepOutput, None]:
        """The engine's outputs without the rows that nobody asked for."""
        # It may have been unloaded while the client took its time over the first response.
        for name, stored in self._dictionaries.items():
            if not self._registry.holds(name, stored):
                raise DictionaryNotFound(f"dictionary {name!r} was unloaded", name=name)
        with self._uses.hold(self._use):
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
                    if output.finish:
                        reason = output.finish.reason.value
                    yield self._without_hidden(output)
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

    async def update(self, edits: tuple[FeatureEdit, ...]) -> int:
        """Replaces the edits and returns their revision; WrongState if the generation has ended."""
        self._asked = program = Program(edits, self._programs[0].read_outs)
        self._use |= program.dictionaries()
        try:
            revision = await self._engine.update(self.request_id, program)
        except InvalidRequest as error:
            raise WrongState(f"the turn has ended: {error}") from error
        self._programs[revision] = program
        return revision

    def _without_hidden(self, output: StepOutput) -> StepOutput:
        shown = tuple(rows for rows in output.activations if rows.read_out < self._visible)
        return replace(output, activations=shown)

    def _observe(self, output: StepOutput) -> None:
        metrics, steered = self._metrics, self.steered
        if output.token_ids and not self.generated:
            metrics.tokens.labels("prompt", steered).inc(self.prompt_length)
            waited = time.perf_counter() - self._began
            metrics.first_token_seconds.labels(steered).observe(waited)
        self.generated += len(output.token_ids)
        metrics.tokens.labels("generated", steered).inc(len(output.token_ids))
        for name, seconds in output.encode_seconds.items():
            metrics.encode_seconds.labels(name).observe(seconds)
        for rows in output.activations:
            if rows.read_out >= self._visible:
                self._watch.observe(rows)
            self._observe_active(rows)
        if output.finish:
            self._observe_reports(output.finish)

    def _observe_active(self, rows: ActivationRows) -> None:
        """Counts a row once, however many read-outs of its dictionary it is in."""
        if rows.active is None:
            return
        in_prompt = rows.positions < self.prompt_length
        for phase, where in (("prompt", in_prompt), ("generated", ~in_prompt)):
            if self._l0_sources.get((rows.dictionary, phase)) == rows.read_out:
                self._metrics.active_features.observe((rows.dictionary,), rows.active[where])

    def _observe_reports(self, finish: Finish) -> None:
        for report in finish.reports:
            entry = self.edits(report.revision)[report.edit]
            changed = self._metrics.edit_tokens.labels(entry.dictionary, op_of(entry.edit))
            changed.inc(report.tokens_changed)
            if report.tokens_in_scope:
                self._metrics.edit_relative_size.observe(report.mean_relative_size)


def _l0_sources(read_outs: Sequence[ReadOut]) -> dict[tuple[str, str], int]:
    """By dictionary and phase: the first read-out at full width, whose rows are counted."""
    found: dict[tuple[str, str], int] = {}
    for index, read_out in enumerate(read_outs):
        for phase, holds in (("prompt", read_out.prompt), ("generated", read_out.generated)):
            if holds and read_out.top_k:
                found.setdefault((read_out.dictionary, phase), index)
    return found
