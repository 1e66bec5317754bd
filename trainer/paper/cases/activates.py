"""What activates a feature: the tokens in each range of its activation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.paper.cases.activity import Activity

LEAST = 20
"""Tokens that a rating rests on."""
_SHOWN = 6


class Kinds:
    """Tokens that differ only in case and in spaces around them, as one."""

    def __init__(self, texts: Sequence[str]) -> None:
        numbers: dict[str, int] = {}
        of = [numbers.setdefault(_kind(text), len(numbers)) for text in texts]
        self.names = list(numbers)
        self.of = torch.tensor(of)
        """The kind of each token."""


class Rating(NamedTuple):
    """How much a feature's strong activations, of at least half its maximum, are on one kind of token."""

    feature: int
    kind: str
    """The most frequent one."""
    share: float
    """Of the strong activations."""
    strong: int
    """How many strong activations there are."""
    maximum: float
    density: float


def ratings(activity: Activity, kinds: Tensor, names: Sequence[str]) -> list[Rating]:
    """Of all features with at least `LEAST` strong activations; `kinds` are those of the text's first tokens.

    Activations behind those tokens are not looked at, but for the density.
    """
    found = []
    for feature in range(len(activity.starts) - 1):
        places, values = activity.of(feature)
        early = places < len(kinds)
        places, values = places[early], values[early]
        if len(values) < LEAST:
            continue
        maximum = values.max().item()
        strong = kinds[places[values >= maximum / 2]]
        if len(strong) >= LEAST:
            best, share = _most_frequent(strong)
            density = activity.density(feature)
            found.append(Rating(feature, names[best], share, len(strong), maximum, density))
    return found


def commonest(
    activity: Activity, feature: int, kinds: Tensor, names: Sequence[str]
) -> list[tuple[str, float]]:
    """The three most frequent kinds among the feature's strong activations, with their shares."""
    places, values = activity.of(feature)
    strong = kinds[places[values >= activity.maximum(feature) / 2]]
    counts = torch.bincount(strong, minlength=1)
    best = counts.topk(min(3, len(counts)))
    numbers: list[int] = [kind for kind in best.indices.tolist() if counts[kind]]
    return [(names[kind], counts[kind].item() / len(strong)) for kind in numbers]


def histogram(
    activity: Activity, feature: int, kinds: Tensor, names: Sequence[str], bins: int
) -> dict[str, Any]:
    """For equal ranges of activation from 0 to the maximum: tokens, and shares of the kinds that lead most of them."""
    places, values = activity.of(feature)
    maximum = activity.maximum(feature)
    of = (values / maximum * bins).long().clamp(max=bins - 1)
    counts = torch.zeros(bins, len(names)).index_put_(
        (of, kinds[places]), torch.ones(len(of)), accumulate=True
    )
    totals = counts.sum(dim=1)
    shares = counts / totals.clamp(min=1)[:, None]
    shown = shares.sum(dim=0).topk(min(_SHOWN, len(names))).indices
    return {
        "maximum": maximum,
        "counts": totals.long().tolist(),
        "kinds": [names[kind] for kind in shown.tolist()],
        "shares": shares[:, shown].T.tolist(),
    }


def strongest_at(
    f: Tensor, activity: Activity, dense: float, most: int = 5
) -> list[tuple[int, float, float, bool]]:
    """The features of the largest activations f at one token, and at least one that is not dense if there is one.

    Each with its activation, its density, and whether that is above `dense`, as of a direction that every token has.
    """
    found = []
    for feature in f.argsort(descending=True).tolist():
        value, density = f[feature].item(), activity.density(feature)
        if value <= 0 or (len(found) >= most and not all(skipped for *_, skipped in found)):
            break
        found.append((feature, value, density, density > dense))
    return found


def fullest_at(x: Tensor, activity: Activity) -> tuple[int, float]:
    """The coordinate of x that is largest as a share of its maximum in the text, and that share."""
    largest = torch.tensor([activity.maximum(number) for number in range(len(x))])
    shares = torch.where(largest > 0, x / largest.clamp(min=1e-9), 0.0)
    best = int(shares.argmax())
    return best, shares[best].item()


def _most_frequent(kinds: Tensor) -> tuple[int, float]:
    counts = torch.bincount(kinds)
    best = int(counts.argmax())
    return best, counts[best].item() / len(kinds)


def _kind(text: str) -> str:
    return text.strip().lower() or repr(text)
