"""Activations that never lie on disk: the model fills a buffer, training draws from it in random order.

The buffer has a fixed number of slots. Rows come from the model context by context, groups of contexts in random order, and
fill it; then, in each round, half of the slots are drawn at random and filled again in place. Which row is in which slot,
and when it is drawn, follows from the seed and the number of rows alone: a checkpoint need not hold the buffer, which is
made again by running the model on the contexts whose rows were still in it. For the same reason a row whose activation a
site leaves out keeps its slot and its turn; the site's batch is shorter by it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.errors import BadConfig, TrainerError
from trainer.files import whole_file
from trainer.harvest import Found, Reader
from trainer.model import device
from trainer.ranks import ALONE, Ranks
from trainer.source import BySite, Rows, random_order
from trainer.stop import Stop

MOMENTS = "moments.safetensors"
_MOMENT_GROUPS = 16
_LONGEST_STAY = 4
"""Rounds after which a row is drawn at the latest, which bounds the contexts that a resumption reads again."""


class Round(NamedTuple):
    """One filling, and what is drawn before the next."""

    slots: Tensor
    """Those that are filled, by consecutive rows."""
    held: Tensor
    """The row in each slot then; -1 if there is none."""
    drawn: Tensor
    """Slots in the order in which they are drawn."""


def rounds(rows: int, capacity: int, generator: torch.Generator) -> Iterator[Round]:
    """The rounds of an epoch of so many rows, each of which is drawn once."""
    held = torch.full((capacity,), -1)
    share = max(1, capacity // 2)
    free = torch.arange(capacity)
    following = 0
    while True:
        slots = free[: rows - following]
        held[slots] = torch.arange(following, following + len(slots))
        following += len(slots)
        if following == rows:
            full = (held >= 0).nonzero().squeeze(1)
            yield Round(slots, held, full[torch.randperm(len(full), generator=generator)])
            return
        turn = torch.randperm(capacity, generator=generator)
        turn[held < following - _LONGEST_STAY * share] -= capacity
        free = turn.argsort()[:share][torch.randperm(share, generator=generator)]
        yield Round(slots, held, free)
        held[free] = -1


class Buffer:
    """The `Source` of all sites of a pass; one run of the model serves them all."""

    def __init__(self, config: TrainConfig, reader: Reader, folder: Path, stop: Stop) -> None:
        """Lengths and means of activations are kept in `folder`."""
        self.sites, self.max_norms = reader.sites, reader.max_norms
        self.train, self.heldout = reader.tokens["train"], reader.tokens["heldout"]
        self._first = config.skip_positions
        self._per_context = config.context - self._first
        self._reader = reader
        self._stop = stop
        self._last: tuple[int, Found] | None = None
        """What was read last, for the next rows may begin in the same group."""
        self._moments = self._find_moments(folder)
        self.widths = {site: len(mean) for site, (_, mean) in self._moments.items()}
        self._capacity = min(config.buffer_rows, self.count)
        self._dtype = getattr(torch, config.activation_dtype)
        self._x: dict[Site, Tensor] = {}
        self._keep: dict[Site, Tensor] = {}

    @property
    def count(self) -> int:
        return len(self.train) * self._per_context

    def scale_and_mean(self, normalise: bool) -> dict[Site, tuple[float, Tensor]]:
        return {
            site: ((len(mean) / square) ** 0.5 if normalise else 1.0, mean.float())
            for site, (square, mean) in self._moments.items()
        }

    def batches(self, config: TrainConfig, step: int, ranks: Ranks = ALONE) -> Iterator[BySite]:
        assert ranks is ALONE, "the buffer is one process's"
        self._allocate()
        epoch, place = divmod(step, self.count // config.batch)
        while True:
            yield from self._epoch(config, epoch, place)
            epoch, place = epoch + 1, 0

    def pieces(self) -> Iterator[Rows]:
        for group in range(self._reader.groups):
            yield self._rows(group)

    def contexts(self, numbers: list[int]) -> Iterator[Rows]:
        length = self.train.shape[1]
        for number in numbers:
            found: dict[Site, tuple[Tensor, Tensor]] = {}
            for site, (x, places) in self._rows(number // self._reader.size).items():
                here = places // length == number
                found[site] = x[here], places[here]
            yield found

    def close(self) -> None:
        self._reader.close()
        self._x, self._keep, self._last = {}, {}, None

    def _epoch(self, config: TrainConfig, epoch: int, place: int) -> Iterator[BySite]:
        """The epoch's batches from that place on."""
        parts: list[BySite] = []
        missing = config.batch
        for drawn in self._turns(random_order(config, epoch), place * config.batch):
            for slots in (drawn[:missing], *drawn[missing:].split(config.batch)):
                # Copies: the slots are filled again before the batch is whole.
                parts.append(self._take(slots))
                missing -= len(slots)
                if not missing:
                    yield self._joined(parts)
                    parts, missing = [], config.batch

    def _turns(self, generator: torch.Generator, skipped: int) -> Iterator[Tensor]:
        """Slots in the order in which they are drawn, filled, after the first `skipped` of the epoch."""
        order = torch.randperm(self._reader.groups, generator=generator)
        whole = self._reader.size * self._per_context
        # The group of the last contexts may be smaller.
        ends = (self.count - order * whole).clamp(max=whole).cumsum(0)
        fresh = True
        for slots, held, drawn in rounds(self.count, self._capacity, generator):
            if skipped >= len(drawn):
                skipped -= len(drawn)
                continue
            if fresh:
                held = held.clone()
                held[drawn[:skipped]] = -1
                slots = (held >= 0).nonzero().squeeze(1)
            self._fill(slots, held[slots], order, ends)
            yield drawn[skipped:]
            skipped, fresh = 0, False

    def _fill(self, slots: Tensor, rows: Tensor, order: Tensor, ends: Tensor) -> None:
        """Puts the epoch's rows of those numbers into the slots; `ends` are those of the groups in their order."""
        groups = torch.searchsorted(ends, rows, right=True)
        with tqdm(desc="fill the buffer", total=len(rows), unit=" tokens", leave=False) as bar:
            for group in groups.unique().tolist():
                self._stop.check("every step before the buffer was filled is saved")
                here = groups == group
                first = int(ends[group - 1]) if group else 0
                at, which = slots[here].to(device()), (rows[here] - first).to(device())
                for site, (x, keep) in self._read(int(order[group])).items():
                    self._x[site][at] = x[which]
                    self._keep[site][at] = keep[which]
                bar.update(len(at))

    def _take(self, slots: Tensor) -> BySite:
        at = slots.to(device())
        return {site: self._x[site][at][self._keep[site][at]].float() for site in self.sites}

    def _joined(self, parts: Sequence[BySite]) -> BySite:
        batch = {site: torch.cat([part[site] for part in parts]) for site in self.sites}
        for site, x in batch.items():
            if not len(x):
                raise TrainerError(
                    f"every activation of a batch at {site} is longer than {self.max_norms[site]:.4g}; "
                    "set a larger max_norm_ratio"
                )
        return batch

    def _rows(self, group: int) -> Rows:
        count, length = self._reader.size, self.train.shape[1]
        contexts = torch.arange(group * count, min((group + 1) * count, len(self.train)))
        places = (contexts[:, None] * length + torch.arange(self._first, length)).flatten()
        return {
            site: (x[keep].cpu(), places[keep.cpu()])
            for site, (x, keep) in self._read(group).items()
        }

    def _read(self, group: int) -> Found:
        if self._last is None or self._last[0] != group:
            self._last = group, self._reader.read(group)
        return self._last[1]

    def _allocate(self) -> None:
        if self._x:
            return
        numbers = self._capacity * sum(self.widths.values())
        needed = numbers * self._dtype.itemsize
        if device().type == "cuda":
            there = torch.cuda.mem_get_info()[0]
        else:
            there = psutil.virtual_memory().available
        if needed > there:
            raise BadConfig(
                f"a buffer of {self._capacity} rows at {', '.join(map(str, self.sites))} needs "
                f"{needed / 2**30:.1f} GiB, {there / 2**30:.1f} GiB are free; set a smaller buffer_rows"
            )
        for site, width in self.widths.items():
            self._x[site] = torch.empty(self._capacity, width, dtype=self._dtype, device=device())
            self._keep[site] = torch.empty(self._capacity, dtype=torch.bool, device=device())

    def _find_moments(self, folder: Path) -> dict[Site, tuple[float, Tensor]]:
        """E|x|^2 and E x, in float64, over groups spread evenly through all; found once per site."""
        paths = {site: folder / str(site) / MOMENTS for site in self.sites}
        new = [site for site, path in paths.items() if not path.exists()]
        if new:
            stride = -(-self._reader.groups // _MOMENT_GROUPS)
            sums: dict[Site, list[Tensor]] = {site: [] for site in new}
            for group in tqdm(range(0, self._reader.groups, stride), desc="measure activations"):
                self._stop.check("training has not begun")
                for site in new:
                    x, keep = self._read(group)[site]
                    kept = x[keep].double()
                    count = kept.new_tensor([len(kept), kept.square().sum().item()])
                    sums[site].append(torch.cat([count, kept.sum(dim=0)]).cpu())
            for site, parts in sums.items():
                count, square, total = torch.stack(parts).sum(dim=0).tensor_split((1, 2))
                with whole_file(paths[site]) as fresh:
                    save_file({"square": square / count, "mean": total / count}, fresh)
        found = {site: load_file(path) for site, path in paths.items()}
        return {site: (table["square"].item(), table["mean"]) for site, table in found.items()}
