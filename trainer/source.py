"""Where training, statistics and examples take activations from, whether they lie on disk or the model is run for them."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.ranks import ALONE, Ranks

BySite = Mapping[Site, Tensor]
Rows = Mapping[Site, tuple[Tensor, Tensor]]
"""At each site activations, and their places: context x context length + position."""


class Source(Protocol):
    """Activations of one site, or of several that come out of the same pass of the model."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def count(self) -> int:
        """Places of an epoch: activations, with those that one site leaves out if it has several."""
        ...

    @property
    def train(self) -> Tensor:
        """Training contexts, contexts x positions, int32."""
        ...

    @property
    def heldout(self) -> Tensor: ...

    @property
    def widths(self) -> Mapping[Site, int]: ...

    @property
    def max_norms(self) -> Mapping[Site, float]:
        """Activations longer than this are left out."""
        ...

    def scale_and_mean(self, normalise: bool) -> Mapping[Site, tuple[float, Tensor]]:
        """s with E|s x|^2 = width, or 1, and E x, over activations spread evenly through all."""
        ...

    def batches(self, config: TrainConfig, step: int, ranks: Ranks = ALONE) -> Iterator[BySite]:
        """The rank's tokens of the batches from that step on, without end.

        A step's batch is the same whichever step they begin with.

        Each epoch is all activations in a new random order, but for those at its end that fill no batch.
        """
        ...

    def pieces(self) -> Iterator[Rows]:
        """All activations, in pieces of whole contexts, in order."""
        ...

    def contexts(self, numbers: list[int]) -> Iterator[Rows]:
        """Those of each of the contexts, whose numbers rise."""
        ...

    def close(self) -> None:
        """Gives back memory; what is asked for later is made anew."""
        ...


def random_order(config: TrainConfig, epoch: int) -> torch.Generator:
    """The random numbers that make the order of that epoch."""
    return torch.Generator().manual_seed(config.data_seed + 1 + 1_000_003 * epoch)
