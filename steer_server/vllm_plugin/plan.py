"""One step's edits at one site, made on the host before the model runs and carried out by the op."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steer_server.dictionary.dictionary import FeatureRows
from steer_server.dictionary.edits import activation_change
from steer_server.vllm_plugin.resident import Residents
from steer_server.vllm_plugin.wire import EditTally, RowEdit


class Stretch(NamedTuple):
    """Batch rows [first, last) of one request on which the same edits hold."""

    vllm_id: str
    first: int
    last: int
    revision: int
    indices: tuple[int, ...]
    """Of the edits at this site, among the revision's."""
    edits: tuple[RowEdit, ...]
    fresh: bool
    """False for rows recomputed after a preemption, which were counted before."""


MAX_RELATIVE_SIZE = 1e4
"""Largest |delta| / |x| of a row. Past some 1e13 the squares in the next norm overflow, and a NaN in a KV block
would outlive its request: vLLM does not clear blocks that it hands on."""


class Outcome(NamedTuple):
    """What the op did: proof that it ran, and how far it moved what."""

    change: Tensor
    """f' - f, [rows, features]."""
    x_norm: Tensor
    """|x|, [rows, 1]."""
    applied: Tensor
    """False for rows left as they were because the delta was too large, [rows, 1]."""


@dataclass(eq=False)
class SitePlan:
    """Two dense products over the union of the edited features, whatever the mix of programs.

    Each row has its own coefficients; a feature that a row's program leaves alone has zeros there, and the
    row's delta gets an exact 0 from it. Rows without a program are not touched at all.
    """

    stretches: list[Stretch]
    rows: Tensor | slice
    """Batch rows with edits, in the order of the stretches."""
    features: FeatureRows
    decoder_norm: Tensor
    gain: Tensor
    offset: Tensor
    share: Tensor
    column: dict[tuple[str, int], int]
    """(dictionary, feature) -> its place among `features`."""
    outcome: Outcome | None = None

    def apply(self, x: Tensor, hidden: Tensor) -> None:
        """Adds the edits' delta to `hidden`; `x` are the batch rows before any edit, in float32."""
        x = x[self.rows]
        x_norm = x.norm(dim=-1, keepdim=True)
        change = activation_change(x, x_norm, self.features, self.gain, self.offset, self.share)
        delta = change @ self.features.decoder
        edited = hidden[self.rows] + delta.to(hidden.dtype)
        applied = delta.norm(dim=-1, keepdim=True) <= MAX_RELATIVE_SIZE * x_norm
        applied &= edited.isfinite().all(dim=-1, keepdim=True)
        hidden[self.rows] = torch.where(applied, edited, hidden[self.rows])
        self.outcome = Outcome(change, x_norm, applied)

    def collect(self) -> tuple[list[tuple[str, EditTally]], set[str]]:
        """Per request what its edits did, once per row; and the requests with a row where they were too large.

        Takes the outcome, so that the plan can serve again.
        """
        assert self.outcome is not None
        change, x_norm, applied = self.outcome
        self.outcome = None
        size = (change.abs() * (self.decoder_norm / x_norm)).cpu().numpy()
        changed = (change != 0).cpu().numpy()
        lengths = [stretch.last - stretch.first for stretch in self.stretches]
        starts = np.cumsum([0, *lengths[:-1]])
        total = np.add.reduceat(size, starts, axis=0)
        largest = np.maximum.reduceat(size, starts, axis=0)
        counts = np.add.reduceat(changed, starts, axis=0, dtype=np.uint32)
        found = []
        for place, stretch in enumerate(self.stretches):
            if stretch.fresh:
                columns = [self.column[edit.dictionary, edit.feature] for edit in stretch.edits]
                tally = EditTally(
                    stretch.revision,
                    lengths[place],
                    np.array(stretch.indices, np.uint32),
                    counts[place, columns],
                    total[place, columns],
                    largest[place, columns],
                )
                found.append((stretch.vllm_id, tally))
        too_large = {
            stretch.vllm_id
            for stretch, held in zip(
                self.stretches,
                np.logical_and.reduceat(applied.cpu().numpy()[:, 0], starts),
                strict=True,
            )
            if not held
        }
        return found, too_large


def plan_site(stretches: Sequence[Stretch], residents: Residents) -> SitePlan:
    """The plan that carries out `stretches`; there is at least one."""
    column: dict[tuple[str, int], int] = {}
    programs: dict[tuple[RowEdit, ...], int] = {}
    for stretch in stretches:
        programs.setdefault(stretch.edits, len(programs))
        for edit in stretch.edits:
            column.setdefault((edit.dictionary, edit.feature), len(column))
    table = torch.zeros(3, len(programs), len(column))
    for edits, number in programs.items():
        for edit in edits:
            place = column[edit.dictionary, edit.feature]
            table[:, number, place] = torch.tensor(edit.coefficients)
    lengths = [stretch.last - stretch.first for stretch in stretches]
    program_of_row = np.repeat([programs[stretch.edits] for stretch in stretches], lengths)
    features = residents.gather(list(column))
    device = features.decoder.device
    gain, offset, share = table[:, torch.from_numpy(program_of_row)].to(device)
    return SitePlan(
        list(stretches),
        _rows(stretches, device),
        features,
        features.decoder.norm(dim=-1),
        gain,
        offset,
        share,
        column,
    )


def _rows(stretches: Sequence[Stretch], device: torch.device) -> Tensor | slice:
    first, last = stretches[0].first, stretches[-1].last
    if sum(stretch.last - stretch.first for stretch in stretches) == last - first:
        return slice(first, last)
    runs = [np.arange(stretch.first, stretch.last) for stretch in stretches]
    return torch.from_numpy(np.concatenate(runs)).to(device)
