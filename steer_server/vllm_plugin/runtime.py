"""Joins requests, row maps, edits and read-outs: everything one worker does for steering, step by step."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer_server.dictionary.site import Site
from steer_server.vllm_plugin.plan import SitePlan, Stretch, plan_site
from steer_server.vllm_plugin.readout import Want, encode
from steer_server.vllm_plugin.requests import RequestState
from steer_server.vllm_plugin.resident import Residents
from steer_server.vllm_plugin.wire import StepResult, WorkerProgram


@dataclasses.dataclass(eq=False)
class Step:
    """What one forward pass is to do; empty when no row belongs to a program."""

    n_rows: int = 0
    states: list[tuple[str, RequestState, int]] = dataclasses.field(default_factory=list)
    """(vLLM's request id, state, end of the positions computed)."""
    plans: dict[int, SitePlan] = dataclasses.field(default_factory=dict)
    """By site number."""
    wants: dict[str, list[Want]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    """By dictionary."""
    read_sites: set[int] = dataclasses.field(default_factory=set)
    taps: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    """By site number: x of all rows before any edit, once the op has run."""


class Runtime:
    """One per worker process; vLLM calls it in the order of the methods here."""

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        self.residents = Residents(sites, device)
        self.op_calls = 0
        self._states: dict[str, RequestState] = {}
        self._step: Step | None = None
        self._plans: dict[int, tuple[list[Stretch], SitePlan]] = {}
        """The last plan of each site; a decoding batch needs the same one step after step."""

    def load(self, name: str, folder: Path, arithmetic: str) -> None:
        self.residents.load(name, folder, arithmetic)

    def admit(self, vllm_id: str, prompt_length: int, content: Mapping[str, Any]) -> None:
        """A request was scheduled for the first time."""
        if vllm_id not in self._states:
            program = WorkerProgram.from_wire(content)
            self._states[vllm_id] = RequestState(content["name"], prompt_length, [program])

    def update(self, name: str, content: Mapping[str, Any]) -> bool:
        """Lets a new program take hold in the next step; False if no such request was scheduled yet."""
        for state in self._states.values():
            if state.name == name:
                state.waiting.append(WorkerProgram.from_wire(content))
                return True
        return False

    def forget(self, vllm_ids: Iterable[str]) -> None:
        """Requests have ended."""
        for vllm_id in vllm_ids:
            self._states.pop(vllm_id, None)

    def begin_step(
        self, vllm_ids: Sequence[str], counts: Sequence[int], starts: Sequence[int]
    ) -> None:
        """The rows of the coming forward pass: for each request how many, and the position of the first."""
        if not self._states:
            return
        step = Step()
        stretches: dict[int, list[Stretch]] = defaultdict(list)
        for vllm_id, count, start in zip(vllm_ids, counts, starts, strict=True):
            state = self._states.get(vllm_id)
            if state is not None:
                state.begin(start)
                step.states.append((vllm_id, state, start + count))
                self._add_rows(step, stretches, vllm_id, start, count)
            step.n_rows += count
        if step.states:
            step.plans = {site: self._plan(site, found) for site, found in stretches.items()}
            self._step = step

    def at_site(self, hidden: Tensor, residual: Tensor | None, site: int) -> None:
        """The op's body. Rows past the step's own are padding and left alone."""
        self.op_calls += 1
        step = self._step
        if step is None:
            return
        plan = step.plans.get(site)
        read = site in step.read_sites
        if plan is None and not read:
            return
        hidden = hidden[: step.n_rows]
        if residual is None:
            x = hidden.float() if hidden.dtype != torch.float32 else hidden.clone()
        else:
            x = hidden.float() + residual[: step.n_rows].float()
        if plan is not None:
            plan.apply(x, hidden)
        if read:
            step.taps[site] = x

    def end_step(self) -> dict[str, list[Any]]:
        """What the step did for each request, by vLLM's id, as `StepResult.to_wire`."""
        step, self._step = self._step, None
        if step is None:
            return {}
        results = {vllm_id: StepResult() for vllm_id, _, _ in step.states}
        for vllm_id, state, end in step.states:
            state.done = max(state.done, end)
            results[vllm_id].applied, state.announced = state.announced, []
            results[vllm_id].skipped, state.skipped = state.skipped, []
        self._collect_edits(step, results)
        self._collect_rows(step, results)
        return {vllm_id: result.to_wire() for vllm_id, result in results.items()}

    def _add_rows(
        self,
        step: Step,
        stretches: dict[int, list[Stretch]],
        vllm_id: str,
        start: int,
        count: int,
    ) -> None:
        state, offset = self._states[vllm_id], step.n_rows - start
        end = start + count
        replayed = min(max(state.done, start), end)
        for segments, fresh in (
            (state.segments(start, replayed), False),
            (state.segments(replayed, end), True),
        ):
            for segment in segments:
                program = state.programs[segment.revision]
                by_site: dict[int, list[int]] = defaultdict(list)
                for index in segment.edits:
                    by_site[self.residents[program.edits[index].dictionary].site].append(index)
                for site, indices in by_site.items():
                    stretches[site].append(
                        Stretch(
                            vllm_id,
                            segment.start + offset,
                            segment.stop + offset,
                            segment.revision,
                            tuple(indices),
                            tuple(program.edits[index] for index in indices),
                            fresh,
                        )
                    )
        self._add_wants(step, vllm_id, replayed, end, offset)

    def _add_wants(self, step: Step, vllm_id: str, start: int, end: int, offset: int) -> None:
        state = self._states[vllm_id]
        for number, spec in enumerate(state.programs[-1].read_outs):
            first = start if spec.prompt else max(start, state.prompt_length)
            last = end if spec.generated else min(end, state.prompt_length)
            if first < last:
                want = Want(vllm_id, number, spec, first + offset, last + offset, first)
                step.wants[spec.dictionary].append(want)
                step.read_sites.add(self.residents[spec.dictionary].site)

    def _plan(self, site: int, stretches: list[Stretch]) -> SitePlan:
        last = self._plans.get(site)
        if last is None or last[0] != stretches:
            self._plans[site] = last = (stretches, plan_site(stretches, self.residents))
        return last[1]

    def _collect_edits(self, step: Step, results: dict[str, StepResult]) -> None:
        for site, plan in step.plans.items():
            if plan.outcome is None:
                for stretch in plan.stretches:
                    results[stretch.vllm_id].error = f"the op did not run at site number {site}"
                continue
            tallies, too_large = plan.collect()
            for vllm_id, tally in tallies:
                results[vllm_id].tallies.append(tally)
            for vllm_id in too_large:
                results[vllm_id].too_large = True

    def _collect_rows(self, step: Step, results: dict[str, StepResult]) -> None:
        for name, wants in step.wants.items():
            resident = self.residents[name]
            x = step.taps.get(resident.site)
            if x is None:
                for want in wants:
                    results[want.vllm_id].error = f"the op did not run for a read-out of {name!r}"
                continue
            encoded = encode(wants, resident.rows, x)
            for vllm_id, rows in encoded.rows:
                results[vllm_id].rows.append(rows)
                results[vllm_id].encode_seconds[name] = encoded.seconds
