"""Joins requests, row maps, edits and read-outs: everything one worker does for steering, step by step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.dictionary.site import Site
from steer_server.errors import EditNotApplied
from steer_server.program_json import from_json
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.dense import DensePlan
from steer_server.vllm_plugin.layout import Layout, TokensOf, lay_out
from steer_server.vllm_plugin.readout import Encoded, Reading, timed
from steer_server.vllm_plugin.report import StepReport
from steer_server.vllm_plugin.requests import RequestState
from steer_server.vllm_plugin.residents import Residents
from steer_server.vllm_plugin.site_edits import Outcome


@dataclass(eq=False)
class Step:
    """One forward pass: what it is to do, and what the op left of it."""

    layout: Layout
    plans: dict[int, DensePlan]
    starts: NDArray[np.int64]
    first: bool
    """Of its layout, so that revisions and gaps are to be told."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By site number."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """By site number: x of all rows before any edit, once the op has run."""
    after: dict[int, Tensor] = field(default_factory=dict)
    encoded: list[tuple[Reading, Encoded, float]] = field(default_factory=list)


class Runtime:
    """One per worker process; vLLM calls it in the order of the methods here."""

    def __init__(
        self,
        sites: Sequence[Site],
        here: Sequence[int],
        d_model: int,
        slots: int,
        device: torch.device,
        reports: bool = True,
        announces: bool = True,
    ) -> None:
        """`here` are the numbers of the sites in this process.

        Another rank that computes the same speaks for one that does not `reports`; of several pipeline stages one
        `announces` where revisions begin.
        """
        self.banks = {site: Bank(slots, d_model, device) for site in here}
        self.residents = Residents(sites, here, self.banks, device)
        self.op_calls = [0] * len(sites)
        """By site number, warm-up included."""
        self._reports = reports
        self._announces = announces
        self._states: dict[str, RequestState] = {}
        self._layout: Layout | None = None
        self._plans: dict[int, DensePlan] = {}
        self._changed = False
        self._step: Step | None = None

    def admit(self, vllm_id: str, prompt_length: int, content: Mapping[str, Any]) -> None:
        """A request was scheduled for the first time, or again after a preemption."""
        if vllm_id not in self._states:
            program = from_json(content["program"])
            self.residents.acquire(program.features())
            self._states[vllm_id] = RequestState(prompt_length, [program])
            self._changed = True

    def update(self, vllm_id: str, content: Mapping[str, Any]) -> None:
        """A new program takes hold with the coming step of the request."""
        program = from_json(content)
        self.residents.acquire(program.features())
        self._states[vllm_id].waiting.append(program)
        self._changed = True

    def forget(self, vllm_ids: Iterable[str]) -> None:
        """Requests have ended."""
        for vllm_id in vllm_ids:
            state = self._states.pop(vllm_id, None)
            if state is not None:
                for program in (*state.programs, *state.waiting):
                    self.residents.release(program.features())
                self._changed = True

    def begin_step(
        self,
        vllm_ids: list[str],
        counts: NDArray[np.int64],
        starts: NDArray[np.int64],
        tokens_of: TokensOf,
    ) -> None:
        """The rows of the coming forward pass: for each request how many, and the position of the first."""
        self._step = None
        if not self._states:
            self._layout = None
            return
        layout = self._layout
        first = self._changed or layout is None or not layout.serves(vllm_ids, counts, starts)
        if first:
            if layout is not None:
                layout.close()
            layout = lay_out(vllm_ids, counts, starts, self._states, self.residents, tokens_of)
            self._layout, self._changed = layout, False
            self._plans = {
                site: DensePlan(edits, self.banks[site], self.residents)
                for site, edits in layout.edits.items()
            }
        assert layout is not None
        layout.starts = starts.copy()
        if layout.members:
            self._step = Step(layout, self._plans, layout.starts, first)

    def at_site(self, hidden: Tensor, residual: Tensor | None, site: int) -> None:
        """The op's body. Rows past the step's own are padding and left alone."""
        self.op_calls[site] += 1
        step = self._step
        if step is None:
            return
        plan = step.plans.get(site)
        reads = {reading.edited for reading in step.layout.readings if reading.site == site}
        if plan is None and not reads:
            return
        hidden = hidden[: step.layout.n_rows]
        if residual is not None:
            residual = residual[: step.layout.n_rows]
        x = _stream(hidden, residual)
        if plan is not None:
            step.outcomes[site] = plan.apply(x, hidden)
        if False in reads:
            step.before[site] = x
        if True in reads:
            step.after[site] = _stream(hidden, residual)

    def end_step(self) -> Step | None:
        """The model has run: asks for what was read, and hands the step over to `report`."""
        step, self._step = self._step, None
        if step is None or not self._reports:
            return None
        for reading in step.layout.readings:
            taps = step.after if reading.edited else step.before
            if reading.site in taps:
                step.encoded.append((reading, *timed(reading, taps[reading.site])))
        return step

    def report(self, step: Step) -> list[Any]:
        """What the step did, as `StepReport.to_wire`; waits for the device."""
        layout = step.layout
        report = StepReport([vllm_id for _, vllm_id, _ in layout.members])
        if step.first and self._announces:
            report.applied, report.skipped = layout.applied, layout.skipped
        for site, edits in layout.edits.items():
            if site not in step.outcomes:
                missed = {run.request for run in edits.runs}
                report.errors += [(r, f"the op did not run at site number {site}") for r in missed]
                continue
            block, too_large = edits.collect(step.outcomes[site])
            report.edits.append(block)
            report.too_large += too_large
        positions = layout.positions(step.starts)
        for reading, encoded, seconds in step.encoded:
            report.rows.append(reading.block(encoded, positions, seconds))
        if len(step.encoded) < len(layout.readings):
            report.errors += [
                (request, "the op did not run for a read-out")
                for request in range(len(layout.members))
            ]
        return report.to_wire()

    def check_called(self, site: int) -> None:
        """EditNotApplied if the model has never called the op at the site."""
        if not self.op_calls[site]:
            raise EditNotApplied(f"the model never called the op of site number {site}")


def _stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """x in float32, apart from the model's own memory."""
    if residual is not None:
        return hidden.float() + residual.float()
    return hidden.float() if hidden.dtype != torch.float32 else hidden.clone()
