"""Where in held-out text features are active."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.files import StoredDictionary
from trainer.harvest import kept
from trainer.model import device
from trainer.paper.lab import training
from trainer.paper.rest import read_until
from trainer.stop import Stop

_TOKENS = 1024


class Activity(NamedTuple):
    """All activations above 0 of a dictionary, feature after feature."""

    places: Tensor
    """Number of the token in the text, int32."""
    values: Tensor
    starts: Tensor
    """Of each feature's entries, and their end."""
    tokens: int
    """That the dictionary is about; not all, for attention sinks are left out."""

    def of(self, feature: int) -> tuple[Tensor, Tensor]:
        """The feature's places, in the order of the text, and its activations there."""
        span = slice(int(self.starts[feature]), int(self.starts[feature + 1]))
        return self.places[span], self.values[span]

    def density(self, feature: int) -> float:
        return int(self.starts[feature + 1] - self.starts[feature]) / self.tokens

    def maximum(self, feature: int) -> float:
        values = self.of(feature)[1]
        return values.max().item() if len(values) else 0.0


def keep(stored: StoredDictionary, x: Tensor) -> Tensor:
    """Which of x, contexts x positions x d_model, the dictionary is about."""
    bound = float(stored.card.training.get("max_norm", torch.finfo(torch.float32).max))
    return kept(training(stored), x, bound)


def survey(
    model: nn.Module, wanted: Sequence[StoredDictionary], contexts: Tensor, stop: Stop
) -> tuple[list[Activity], Activity]:
    """Of each dictionary, in one pass, and of the coordinates at the first one's site."""
    sites = list(dict.fromkeys(stored.card.site for stored in wanted))
    basis = Dictionary.directions(torch.eye(wanted[0].card.d_model))
    readers = [(stored, stored.dictionary) for stored in wanted] + [(wanted[0], basis)]
    readers = [(stored, dictionary.to(device())) for stored, dictionary in readers]
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in readers]
    tokens = [0] * len(readers)
    numbers = torch.arange(contexts.numel(), dtype=torch.int32).view(contexts.shape)
    size = max(1, _TOKENS // contexts.shape[1])
    with tqdm(desc="held-out text", total=contexts.numel(), unit=" tokens") as bar:
        for batch, places in zip(contexts.split(size), numbers.split(size), strict=True):
            stop.check("what is in the results stays; the text is read anew")
            found = dict(zip(sites, read_until(model, sites, batch), strict=True))
            for number, (stored, dictionary) in enumerate(readers):
                active, count = _active(stored, dictionary, found[stored.card.site], places)
                parts[number].append(active)
                tokens[number] += count
            bar.update(batch.numel())
    widths = [dictionary.n_features for _, dictionary in readers]
    all_found = [_sorted(*of) for of in zip(parts, widths, tokens, strict=True)]
    return all_found[:-1], all_found[-1]


def _active(
    stored: StoredDictionary, dictionary: Dictionary, x: Tensor, places: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    mask = keep(stored, x)
    f = dictionary.encode(x[mask].float()).clamp(min=0.0).cpu()
    at, feature = f.nonzero(as_tuple=True)
    return (places[mask.cpu()][at], feature, f[at, feature]), len(f)


def _sorted(parts: Sequence[tuple[Tensor, ...]], n_features: int, tokens: int) -> Activity:
    places, features, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = features.argsort(stable=True)
    starts = torch.bincount(features, minlength=n_features).cumsum(dim=0)
    starts = torch.cat([starts.new_zeros(1), starts])
    return Activity(places[order], values[order], starts, tokens)
