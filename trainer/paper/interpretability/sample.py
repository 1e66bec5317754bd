"""Which features of a dictionary are explained, and what they do on the fragments."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer_server.dictionary.files import StoredDictionary
from trainer.model import device
from trainer.paper.interpretability.fragments import Activations, Fragments
from trainer.paper.interpretability.records import (
    Records,
    choose,
    generator,
    least_firing,
    records,
)
from trainer.stop import Stop


class Moments(NamedTuple):
    """Of a feature's activations over all tokens of the fragments, those at 0 among them."""

    density: float
    """Share of the tokens with an activation above 0."""
    mean: float
    variance: float
    skewness: float
    """Third standardised moment."""
    kurtosis: float
    """Fourth standardised moment: 3 for a normal distribution."""


class Sample(NamedTuple):
    """Features of one dictionary."""

    features: list[int]
    eligible: int
    """Features that are active in enough fragments to be drawn; scores say nothing of the others."""
    activations: Float[Tensor, "fragments tokens features"]
    """Not below 0: activations that may be negative, such as coordinates, pass a ReLU first, as in the paper."""
    moments: list[Moments]

    def records(self, number: int, fragments: Fragments, examples: int, seed: int) -> Records:
        """The fragments of the `number`-th feature."""
        f = self.activations[:, :, number]
        chosen = choose(f.amax(dim=1), examples, generator(seed, self.features[number]))
        assert chosen is not None, "only features that are active in enough fragments are drawn"
        return records(chosen, f, fragments.texts)


@torch.inference_mode()
def draw(
    stored: StoredDictionary,
    activations: Activations,
    count: int,
    examples: int,
    seed: int,
    stop: Stop,
) -> Sample:
    """At most `count` features, at random among those that are active in enough fragments.

    The paper's code takes the first ones, which of PCA are those of most variance.
    """
    dictionary = stored.dictionary.to(device())
    active = torch.zeros(stored.card.n_features, dtype=torch.int64)
    kept: list[Tensor] = []
    for x, keep in _kept(stored, activations, stop):
        f = dictionary.encode(x).clamp(min=0.0) * keep[:, :, None]
        active += (f.amax(dim=1) > 0).sum(dim=0).cpu()
        kept.append(keep.cpu())
    eligible = (active >= least_firing(examples)).nonzero().squeeze(1)
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed))
    features = eligible[order[:count]].tolist()
    parts = [
        (dictionary.encode_features(x, features).clamp(min=0.0) * keep[:, :, None]).cpu()
        for x, keep in _kept(stored, activations, stop)
    ]
    f = torch.cat(parts)
    return Sample(features, len(eligible), f, moments(f[torch.cat(kept)]))


def moments(f: Float[Tensor, "tokens features"]) -> list[Moments]:
    """Of each feature."""
    found = []
    for column in f.T:
        values = column.double()
        mean = values.mean()
        central = values - mean
        variance = central.square().mean()
        scale = variance.sqrt()
        third, fourth = (((central / scale) ** power).mean().item() for power in (3, 4))
        density = (values > 0).double().mean().item()
        found.append(Moments(density, mean.item(), variance.item(), third, fourth))
    return found


def _kept(
    stored: StoredDictionary, activations: Activations, stop: Stop
) -> Iterator[tuple[Tensor, Tensor]]:
    """x and where it is one that the dictionary is about: attention sinks, which training leaves out, count as inactive."""
    max_norm = stored.card.training["max_norm"]
    for x in activations.pieces(stored.card.site):
        stop.check("scores of earlier dictionaries are there")
        yield x, x.norm(dim=-1) <= max_norm
