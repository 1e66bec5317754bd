"""What causes a feature: how much less active it is without each earlier one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steer_server.dictionary.files import StoredDictionary
from trainer.model import device
from trainer.paper.cases.activity import keep
from trainer.paper.rest import Rest

_ROWS = 2048
"""Tokens that run at once."""


class Feature(NamedTuple):
    stored: StoredDictionary
    number: int


class Causes(NamedTuple):
    """Of one feature, among those of one earlier dictionary."""

    features: Tensor
    """That are active in some context; without any other the feature is as active as before."""
    falls: Tensor
    """Mean over contexts of how much less active the feature is, over its mean activation."""


@torch.no_grad()
def causes(
    model: nn.Module,
    of: Feature,
    source: StoredDictionary,
    sequences: Sequence[Tensor],
    among: Sequence[int] | None = None,
) -> Causes:
    """At the last token of each sequence, by ablating each feature of `source`, or each one `among` them, alone.

    Ablated as in `effects`, at all positions of the sequence; the layers in between run.
    """
    total = torch.zeros(source.card.n_features)
    active = torch.zeros(source.card.n_features, dtype=torch.bool)
    level = 0.0
    for tokens in sequences:
        own, features, falls = _in_one(model, of, source, tokens, among)
        total[features] += falls
        active[features] = True
        level += own
    features = active.nonzero().squeeze(1)
    return Causes(features, total[features] / max(level, 1e-9))


def _in_one(
    model: nn.Module,
    of: Feature,
    source: StoredDictionary,
    tokens: Tensor,
    among: Sequence[int] | None,
) -> tuple[float, Tensor, Tensor]:
    """The feature's activation, the features that are active and how much it falls without each."""
    rest = Rest(model, source.card.site, tokens[None], torch.tensor([len(tokens)]))
    dictionary = source.dictionary.to(device())
    f = dictionary.encode(rest.x[0]) * keep(source, rest.x)[0, :, None]
    # From a sublayer to what comes after it in its layer, no position sees another.
    seen = f[-1:] if source.card.site.layer == of.stored.card.site.layer else f
    active = seen.any(dim=0)
    if among is not None:
        wanted = torch.zeros_like(active)
        wanted[list(among)] = True
        active &= wanted
    features = active.nonzero().squeeze(1)
    (level,) = _activations(rest, of, rest.x).tolist()
    if not len(features):
        return level, features.cpu(), torch.zeros(0)
    falls = []
    for some in features.split(max(1, _ROWS // len(tokens))):
        deltas = f[:, some].T[..., None] * dictionary.rows.decoder[some][:, None]
        falls.append(level - _activations(rest, of, rest.x - deltas))
    return level, features.cpu(), torch.cat(falls)


def _activations(rest: Rest, of: Feature, x: Tensor) -> Tensor:
    """The feature's at the last position, for each row of x."""
    rows = torch.zeros(len(x), dtype=torch.int64)
    later = rest.at(of.stored.card.site, x, rows)[:, -1]
    dictionary = of.stored.dictionary.to(device())
    return dictionary.encode_features(later, [of.number])[:, 0].cpu()


def strongest(found: Causes, most: int) -> list[tuple[int, float]]:
    """Features without which the feature falls most, and by what share."""
    best = found.falls.topk(min(most, len(found.falls)))
    pairs = zip(found.features[best.indices].tolist(), best.values.tolist(), strict=True)
    return [(feature, fall) for feature, fall in pairs if fall > 0]


def spread(found: Causes) -> dict[str, Any]:
    """How many features are active, and what is usual among them."""
    sizes = found.falls.abs()
    return {
        "active": len(found.features),
        "median": sizes.median().item() if len(sizes) else 0.0,
        "above_tenth": int((found.falls > 0.1).sum()),
    }
