"""Joins requests, row maps, edits and read-outs: everything one worker does for steering, step by step."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.dictionary.site import Site
from steer_server.vllm_plugin import encode_kernel
from steer_server.vllm_plugin.bank import Bank
from steer_server.vllm_plugin.dense_site import DenseSite
from steer_server.vllm_plugin.kernel_site import KernelSite
from steer_server.vllm_plugin.layout import Layout, TokensOf, lay_out
from steer_server.vllm_plugin.programs import Programs
from steer_server.vllm_plugin.readout import Reading
from steer_server.vllm_plugin.report import EditRows, StepReport
from steer_server.vllm_plugin.requests import RequestState
from steer_server.vllm_plugin.residents import Residents
from steer_server.vllm_plugin.site_edits import Outcome
from steer_server.vllm_plugin.transfer import Transfer


@dataclass(eq=False)
class Step:
    """One forward pass: what it was to do, and what it left, on its way to the host."""

    layout: Layout
    starts: NDArray[np.int64]
    first: bool
    """Of its layout, so that revisions and gaps are to be told."""
    outcomes: dict[int, Transfer] = field(default_factory=dict)
    """By site number."""
    encoded: list[tuple[Reading, Transfer, float]] = field(default_factory=list)
    """With the seconds it took to ask for it."""
    missed: list[Reading] = field(default_factory=list)
    """Read-outs whose x the op did not keep."""


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
        kernel_rows: int = 0,
    ) -> None:
        """`here` are the numbers of the sites in this process; `kernel_rows`, if not 0, lets Triton do the work for
        passes of so many rows at most.

        Another rank that computes the same speaks for one that does not `reports`; of several pipeline stages one
        `announces` where revisions begin.
        """
        self.banks = {site: Bank(slots, d_model, device) for site in here}
        self.residents = Residents(sites, here, self.banks, device, by_rank=not kernel_rows)
        self._programs = Programs(self.residents)
        self._sites: dict[int, DenseSite | KernelSite] = {
            site: KernelSite(bank, d_model, kernel_rows)
            if kernel_rows
            else DenseSite(bank, self.residents)
            for site, bank in self.banks.items()
        }
        self._kernels = bool(kernel_rows)
        self._d_model, self._device = d_model, device
        self.op_calls = [0] * len(sites)
        """By site number, warm-up included."""
        self._reports = reports
        self._announces = announces
        self._states: dict[str, RequestState] = {}
        self._layout: Layout | None = None
        self._changed = False
        self._step: Step | None = None

    def warm_up(self) -> None:
        """Compiles the kernels that the model's own warm-up does not call; Triton's interpreter has nothing to compile."""
        if self._kernels and self.banks and self._device.type == "cuda":
            encode_kernel.warm_up(self._d_model, self._device)

    def admit(self, vllm_id: str, content: Mapping[str, Any]) -> None:
        """A request was scheduled for the first time, or again after a preemption."""
        if vllm_id not in self._states:
            program = self._programs.acquire(content["program"])
            self._states[vllm_id] = RequestState(content["prompt_length"], [program])
            self._changed = True

    def update(self, vllm_id: str, text: str, first: int = 0) -> None:
        """A new program takes hold with the coming step of the request, at position `first` at the earliest."""
        self._states[vllm_id].waiting.append((self._programs.acquire(text), first))
        self._changed = True

    def forget(self, vllm_ids: Iterable[str]) -> None:
        """Requests have ended."""
        for vllm_id in vllm_ids:
            state = self._states.pop(vllm_id, None)
            if state is not None:
                for program in (*state.programs, *(program for program, _ in state.waiting)):
                    self._programs.release(program)
                self._changed = True

    def unload(self, name: str) -> None:
        """Forgets a dictionary that no running request names.

        Of a request that has ended the coming step would tell; one that named the dictionary goes now, with its slots, so
        that another dictionary of the name finds none of them.
        """
        ended = [vllm_id for vllm_id, state in self._states.items() if state.names(name)]
        self.forget(ended)
        self.residents.pop(name, None)
        if self._layout is not None and self._step is None:
            # It may hold the dictionary's rows.
            self._layout.close()
            self._follow(None)
        else:
            self._changed = True

    def begin_step(
        self,
        vllm_ids: list[str],
        counts: NDArray[np.int64],
        starts: NDArray[np.int64],
        tokens_of: TokensOf,
    ) -> None:
        """The rows of the coming forward pass: for each request how many, and the position of the first.

        The arrays are kept.
        """
        self._step = None
        if not self._states:
            if self._layout is not None:
                self._follow(None)
            return
        layout = self._layout
        first = self._changed or layout is None or not layout.serves(vllm_ids, counts, starts)
        if first:
            if layout is not None:
                layout.close()
            layout = lay_out(
                vllm_ids,
                counts,
                starts,
                self._states,
                self._programs,
                self.residents,
                tokens_of,
                self._kernels,
            )
            self._follow(layout)
        assert layout is not None
        if layout.members:
            self._step = Step(layout, starts, first)
            for site in self._sites.values():
                site.begin()

    def at_site(self, hidden: Tensor, residual: Tensor | None, site: int) -> None:
        """The op's body."""
        self.op_calls[site] += 1
        self._sites[site].run(hidden, residual)

    def end_step(self) -> Step | None:
        """The model has run: asks for what was read, and hands the step over to `report`."""
        step, self._step = self._step, None
        if step is None or not self._reports:
            return None
        passes = {number: site.end() for number, site in self._sites.items()}
        for number in step.layout.edits:
            outcome = passes[number].outcome
            if outcome is not None:
                step.outcomes[number] = Transfer([t for t in outcome if t is not None])
        for reading in step.layout.readings:
            found = passes[reading.site]
            x = found.after if reading.edited else found.before
            if x is None:
                step.missed.append(reading)
            else:
                began = time.perf_counter()
                rows = reading.rows_of(x)
                encoded = list(reading.encode(rows))
                if self._kernels:
                    # Whether a replayed graph wrote there is told by what it left.
                    encoded.append(rows[:, 0].clone())
                step.encoded.append((reading, Transfer(encoded), time.perf_counter() - began))
        return step

    def report(self, step: Step) -> list[Any]:
        """What the step did, as `StepReport.to_wire`; waits for the device."""
        layout = step.layout
        report = StepReport([vllm_id for _, vllm_id, _ in layout.members])
        if step.first and self._announces:
            report.applied, report.skipped = layout.applied, layout.skipped
        for number, edits in layout.edits.items():
            outcome = Outcome(*step.outcomes[number].wait()) if number in step.outcomes else None
            if outcome is None or (self._kernels and (outcome.x_norm < 0).any()):
                positions = layout.positions(step.starts)
                first = {run.request: int(positions[run.first]) for run in reversed(edits.runs)}
                why = f"the op did not run at site number {number}"
                report.missed += [(request, position, why) for request, position in first.items()]
                continue
            found = edits.collect(outcome)
            if isinstance(found, EditRows):
                report.edit_rows.append(found)
            else:
                report.edits.append(found)
            report.limited += edits.limited(outcome)
            if np.count_nonzero(outcome.applied) < outcome.applied.size:
                report.too_large += edits.too_large(outcome, layout.positions(step.starts))
        missed = [request for reading in step.missed for request in reading.requests]
        positions = layout.positions(step.starts) if step.encoded else step.starts
        for reading, transfer, seconds in step.encoded:
            encoded = transfer.wait()
            if self._kernels:
                missed += reading.requests_at(np.isnan(encoded.pop()))
            report.rows.append(reading.block(encoded, positions, seconds))
        report.errors += [(request, "the op did not run for a read-out") for request in missed]
        return report.to_wire()

    def counts(self) -> dict[str, int]:
        """What is kept for requests, which is nothing once all have ended and another pass has run."""
        slots = sum(bank.slots.used for bank in self.banks.values())
        return {
            "requests": len(self._states),
            "slots": slots,
            "layout_members": len(self._layout.members) if self._layout else 0,
        }

    def _follow(self, layout: Layout | None) -> None:
        """The sites do from now on what the layout says."""
        self._layout, self._changed = layout, False
        for number, site in self._sites.items():
            if layout is None:
                site.prepare(None, before=False, after=False, n_rows=0)
            else:
                kinds = {reading.edited for reading in layout.readings if reading.site == number}
                edits = layout.edits.get(number)
                site.prepare(edits, False in kinds, True in kinds, layout.n_rows)
