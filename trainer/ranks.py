"""Processes that torchrun started for one training: which share is whose, and what they tell each other.

All ranks make the same calls in the same order. What one of them finds is a share, of the tokens of a batch or of the
features of a dictionary, and shares add up; alone, every call returns what it was given and costs nothing.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import Parallel, TrainConfig
from trainer.errors import RankLost
from trainer.stop import Stop

_LARGE = 2**18
"""Numbers from which on a tensor is summed in place; smaller ones travel together."""
_POLL = 0.1
"""Seconds."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    parallel: Parallel = "data"
    here: int = 1
    """How many of them are on this machine."""

    @property
    def first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    @property
    def split_tokens(self) -> bool:
        return self.size > 1 and self.parallel == "data"

    @property
    def split_features(self) -> bool:
        return self.size > 1 and self.parallel == "features"

    def saves(self, configs: Sequence[TrainConfig]) -> list[TrainConfig]:
        """Those whose dictionaries this rank evaluates and saves."""
        if self.parallel == "members":
            return list(configs[self.rank :: self.size])
        return list(configs) if self.first else []

    def own_tokens(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch."""
        return batch.chunk(self.size)[self.rank] if self.split_tokens else batch

    def all_tokens(self, own: int) -> int:
        """How many tokens a batch has of which each rank has that many."""
        return own * self.size if self.split_tokens else own

    def own_features(self, rows: Tensor) -> Tensor:
        """Every size-th of a dictionary's rows, so that each rank has its part of every prefix."""
        return rows[self.rank :: self.size] if self.split_features else rows

    def count_own(self, features: int) -> int:
        """How many of a dictionary's first so many features this rank has."""
        return len(range(self.rank, features, self.size)) if self.split_features else features

    def over_tokens(self, share: Tensor) -> Tensor:
        """The sum of all ranks' `share` if each has its own tokens, else the share, which is the whole."""
        return self._sum(share) if self.split_tokens else share

    def over_features(self, share: Tensor) -> Tensor:
        """The sum of all ranks' `share` if each has its own features, else the share, which is the whole."""
        return self._sum(share) if self.split_features else share

    def once(self, whole: Tensor) -> Tensor:
        """A share of what every rank has whole when features are split; else the share it is already."""
        return torch.zeros_like(whole) if self.split_features and self.rank else whole

    def any_feature(self, found: Tensor) -> Tensor:
        """Where any rank found something among its features."""
        return self.over_features(found.float()) > 0 if self.split_features else found

    def places(self, best: Tensor) -> Tensor:
        """Where each of `best`, sorted downwards along the last dimension, stands among those of all features.

        Of equal ones that of the lower rank comes first, so that no two have the same place. Ranks may have different
        numbers of them.
        """
        own = best.shape[-1]
        if not self.split_features:
            return torch.arange(own, device=best.device)
        widest = int(self._gather(torch.tensor([own])).max())
        padded = torch.nn.functional.pad(best, (0, widest - own), value=float("-inf"))
        together = torch.cat(list(self._gather(padded)), dim=-1)
        order = together.argsort(dim=-1, descending=True, stable=True)
        counted = torch.arange(order.shape[-1], device=best.device).expand_as(order)
        place = torch.empty_like(order).scatter_(-1, order, counted)
        return place[..., self.rank * widest :][..., :own]

    def nth_largest(self, z: Tensor, n: Sequence[int], guess: Tensor) -> Tensor:
        """Of each member, the n-th largest of all ranks' `z`.

        `guess` lies below it, most likely; a wrong one costs time.
        """
        found = [self._nth_largest(*member) for member in zip(z, n, guess, strict=True)]
        return torch.stack(found)

    def _nth_largest(self, z: Tensor, n: int, guess: Tensor) -> Tensor:
        own = z[z > guess]
        counts = self._gather(torch.tensor([len(own)]))
        if counts.sum() < n:
            own = z.flatten()
            counts.fill_(len(own))
        if len(own) > n:
            own = own.topk(n, sorted=False).values
        padded = z.new_full((min(n, int(counts.max())),), float("-inf"))
        padded[: len(own)] = own
        return self._gather(padded).flatten().topk(n, sorted=False).values.min()

    def sum_(self, shares: Sequence[Tensor]) -> None:
        """Turns each rank's shares into the sums over all ranks, in place."""
        small = [share for share in shares if share.numel() < _LARGE]
        with reaching_all():
            waiting = [
                dist.all_reduce(share, async_op=True) for share in shares if share.numel() >= _LARGE
            ]
            if small:
                together = torch.cat([share.reshape(-1) for share in small])
                dist.all_reduce(together)
                parts = together.split([share.numel() for share in small])
                for share, part in zip(small, parts, strict=True):
                    share.copy_(part.view_as(share))
            for work in waiting:
                assert work is not None
                work.wait()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; none goes on before all have said."""
        if self.size == 1:
            return flag
        return bool(self._gather(torch.tensor([int(flag)])).any())

    def meet(self) -> None:
        """Goes on once all ranks are here."""
        self.any(False)

    def agree(self, number: int) -> bool:
        """Whether all ranks have the same number."""
        return self.size == 1 or len(self._gather(torch.tensor([number])).unique()) == 1

    def take_first_(self, tensors: Iterable[Tensor]) -> None:
        """Takes over the first rank's: processors that differ round differently."""
        if self.size > 1:
            with reaching_all():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def wait_for(self, paths: Iterable[Path], stop: Stop, done: str) -> None:
        """Goes on once another rank has written them; `done` is as in `Stop.check`."""
        for path in paths:
            while not path.exists():
                stop.check(done)
                time.sleep(_POLL)

    def _sum(self, share: Tensor) -> Tensor:
        share = share.contiguous()
        self.sum_([share])
        return share

    def _gather(self, own: Tensor) -> Tensor:
        """All ranks' tensors, stacked."""
        found = own.new_empty(self.size, *own.shape)
        with reaching_all():
            dist.all_gather(list(found), own.contiguous())
        return found


ALONE = Ranks()


@contextmanager
def reaching_all() -> Iterator[None]:
    """RankLost if what is done in the block finds another process gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"another process of this training ended, or cannot be reached ({str(error).splitlines()[0]}); its own "
            "message says why. The same command goes on from the last checkpoint."
        ) from error
