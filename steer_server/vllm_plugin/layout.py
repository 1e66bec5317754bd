"""What the rows of a batch are to do: made when the batch or a program changes, kept while neither does.

A decoding batch goes on for many steps with the same requests, each one position further on. Then a step costs a
few comparisons of arrays, and no loop over requests, unless an edit depends on the token read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from steer_server.vllm_plugin.programs import Programs
from steer_server.vllm_plugin.readout import Reading, Want, readings
from steer_server.vllm_plugin.requests import FOREVER, RequestState, Segment, Tokens
from steer_server.vllm_plugin.residents import Resident, Residents
from steer_server.vllm_plugin.site_edits import Run, SiteEdits

TokensOf = Callable[[int], Tokens]
"""The tokens of the request at an index of the batch."""


@dataclass(eq=False)
class Layout:
    """The rows of one forward pass, request by request, and all that programs want of them."""

    vllm_ids: list[str]
    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    """Of the step it was made for, or of the last one it served."""
    steps: int = 1
    """How many in a row it serves: up to where a request's rows are no longer all alike."""
    n_rows: int = 0
    members: list[tuple[int, str, RequestState]] = field(default_factory=list)
    """(index in the batch, vLLM's id, state) of the requests with a program."""
    edits: dict[int, SiteEdits] = field(default_factory=dict)
    """By site number."""
    readings: list[Reading] = field(default_factory=list)
    applied: list[tuple[int, int, int]] = field(default_factory=list)
    """(member, revision, position) of the programs that begin to hold with its first step."""
    skipped: list[tuple[int, int, int]] = field(default_factory=list)
    """(member, start, stop) of positions that its first step takes from the prefix cache."""

    def __post_init__(self) -> None:
        self.n_rows = int(self.counts.sum())
        # Comparing bytes takes less than comparing arrays and asking whether all are equal.
        self._counts = self.counts.tobytes()

    def serves(
        self, vllm_ids: Sequence[str], counts: NDArray[np.int64], starts: NDArray[np.int64]
    ) -> bool:
        """Whether the coming step is this one moved on, every request going on where it stopped; if so it moves on."""
        if (
            self.steps <= 1
            or self.vllm_ids != vllm_ids
            or self._counts != counts.tobytes()
            or (self.starts + self.counts).tobytes() != starts.tobytes()
        ):
            return False
        self.starts = starts
        self.steps -= 1
        return True

    def positions(self, starts: NDArray) -> NDArray[np.int64]:
        """The position of each row."""
        if self.n_rows == len(starts):
            return starts
        first = np.cumsum(self.counts) - self.counts
        return np.arange(self.n_rows) + np.repeat(starts - first, self.counts)

    def close(self) -> None:
        """Lets the requests know how far they have come."""
        ends = (self.starts + self.counts).tolist()
        for index, _, state in self.members:
            state.done = max(state.done, ends[index])


def lay_out(
    vllm_ids: list[str],
    counts: NDArray,
    starts: NDArray,
    states: Mapping[str, RequestState],
    programs: Programs,
    residents: Residents,
    tokens_of: TokensOf,
    kernels: bool,
) -> Layout:
    """The layout of the coming step; updates that were waiting take hold."""
    layout = Layout(list(vllm_ids), counts, starts)
    stops = np.full(len(vllm_ids), FOREVER)
    runs: dict[int, list[Run]] = {}
    wants: list[tuple[Resident, Want]] = []
    row = 0
    for index, (vllm_id, count, start) in enumerate(
        zip(vllm_ids, counts.tolist(), starts.tolist(), strict=True)
    ):
        state = states.get(vllm_id)
        if state is not None:
            request, end = len(layout.members), start + count
            applied, skipped = state.begin(start)
            layout.applied += [(request, revision, position) for revision, position in applied]
            layout.skipped += [(request, first, last) for first, last in skipped]
            layout.members.append((index, vllm_id, state))
            done = min(max(state.done, start), end)
            for first, last, fresh in ((start, done, False), (done, end, True)):
                for segment in state.segments(first, last, tokens_of(index)):
                    _add_runs(runs, request, state, segment, row - start, fresh, programs)
            wants += _wants(request, state, done, end, row - start, residents)
            steady = done == start and state.starts[-1] <= start
            stops[index] = max(end, state.steady_until(start)) if steady else end
        row += count
    layout.steps = int(((stops - starts) // np.maximum(counts, 1)).min(initial=FOREVER))
    layout.edits = {site: SiteEdits(found) for site, found in runs.items()}
    layout.readings = readings(wants, kernels)
    return layout


def _add_runs(
    runs: dict[int, list[Run]],
    request: int,
    state: RequestState,
    segment: Segment,
    shift: int,
    fresh: bool,
    programs: Programs,
) -> None:
    program = state.programs[segment.revision]
    for site, entries in programs.entries(program, segment.edits, segment.start).items():
        first, last = segment.start + shift, segment.stop + shift
        run = Run(request, first, last, segment.revision, entries, fresh)
        runs.setdefault(site, []).append(run)


def _wants(
    request: int, state: RequestState, start: int, end: int, shift: int, residents: Residents
) -> list[tuple[Resident, Want]]:
    found = []
    for revision, begin, stop in state.revisions(start, end):
        for number, spec in enumerate(state.programs[revision].read_outs):
            first = begin if spec.prompt else max(begin, state.prompt_length)
            last = stop if spec.generated else min(stop, state.prompt_length)
            resident = residents.get(spec.dictionary)
            if first < last and resident is not None:
                want = Want(request, number, spec, first + shift, last + shift)
                found.append((resident, want))
    return found
