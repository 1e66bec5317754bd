"""What a feature does: the next token's distribution where it is active, with the feature ablated and without."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.files import StoredDictionary
from trainer.model import device
from trainer.paper.cases.activity import keep
from trainer.paper.rest import Rest

LIKELY = 1e-3
"""Mean probability without an edit of tokens whose log-probabilities are looked at: those of tokens that never come are noise."""
VISIBLE = 0.1
"""Logits that change less are not shown, as in the paper."""
_LISTED = 8
_AT_ONCE = 8


class Effect(NamedTuple):
    """Means over contexts, for each token of the vocabulary."""

    logits: Tensor
    """Change by ablating the feature."""
    log_probabilities: Tensor
    placebo: Tensor
    """Change of log-probabilities by ablating, instead, the feature whose part of x there is closest in length."""
    probabilities: Tensor
    """Without an edit."""
    each: Tensor
    """Change of log-probabilities in each context."""


@torch.no_grad()
def effect(
    model: nn.Module, stored: StoredDictionary, feature: int, sequences: Sequence[Tensor]
) -> Effect:
    """Of ablating the feature in token sequences, at the token after each.

    At every position that the dictionary is about, f W_dec is subtracted from x ("less than rank one"), so that the
    rest of x stays, what the dictionary does not reconstruct included.
    """
    parts = [
        _part(model, stored, feature, sequences[start : start + _AT_ONCE])
        for start in range(0, len(sequences), _AT_ONCE)
    ]
    logits, changed, placebo, before = (torch.cat(rows) for rows in zip(*parts, strict=True))
    means = (rows.mean(dim=0) for rows in (logits, changed, placebo, before))
    return Effect(*means, each=changed)


def _part(
    model: nn.Module, stored: StoredDictionary, feature: int, sequences: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    rest = Rest(model, stored.card.site, padded, lengths)
    dictionary = stored.dictionary.to(device())
    f = dictionary.encode(rest.x) * keep(stored, rest.x)[..., None]
    rows = torch.arange(len(sequences))
    chosen = torch.full((len(sequences),), feature, device=f.device)
    other = _closest(dictionary, f[rows, lengths - 1], feature)
    # The unedited ones in the same pass, so that equal x gives equal logits.
    edits = [torch.zeros_like(rest.x), *(without(dictionary, f, of) for of in (chosen, other))]
    x = torch.cat([rest.x + delta for delta in edits])
    before, after, placebo = rest.logits(x, rows.repeat(3)).cpu().chunk(3)
    plain = before.log_softmax(dim=-1)
    changes = [logits.log_softmax(dim=-1) - plain for logits in (after, placebo)]
    return after - before, *changes, plain.exp()


def without(dictionary: Dictionary, f: Tensor, features: Tensor) -> Tensor:
    """What to add to each sequence's x to ablate its feature, [sequences, positions, d_model]; f of the unedited x."""
    own = f.gather(2, features[:, None, None].expand(-1, f.shape[1], 1))
    return -own * dictionary.rows.decoder[features][:, None]


def _closest(dictionary: Dictionary, f: Tensor, feature: int) -> Tensor:
    """For each row of f another active feature whose part of x is closest in length; `feature` itself if there is none."""
    lengths = f.abs() * dictionary.rows.decoder.norm(dim=1)
    distance = (lengths - lengths[:, feature, None]).abs()
    distance = distance.masked_fill(f == 0, torch.inf)
    distance[:, feature] = torch.finfo(distance.dtype).max
    return distance.argmin(dim=1)


def target(effect: Effect) -> tuple[int, float]:
    """The likely token whose log-probability falls most, and by how much it changes."""
    falls = effect.log_probabilities.masked_fill(effect.probabilities < LIKELY, torch.inf)
    token = int(falls.argmin())
    return token, falls[token].item()


def as_json(effect: Effect, token: int, texts: Sequence[str]) -> dict[str, Any]:
    """What the page shows: of `token` and of the tokens that change most."""
    likely = (effect.probabilities >= LIKELY).nonzero().squeeze(1)
    every = torch.arange(len(effect.logits))
    falls = effect.each[:, token]
    return {
        "contexts": len(effect.each),
        "token": texts[token],
        "probability": effect.probabilities[token].item(),
        "logit": effect.logits[token].item(),
        "rank": int((effect.logits < effect.logits[token]).sum()) + 1,
        "log_probability": falls.mean().item(),
        "placebo": effect.placebo[token].item(),
        "falls": (falls < 0).double().mean().item(),
        "visible": int((effect.logits < -VISIBLE).sum()),
        "logits": _extremes(effect.logits, every, texts),
        "log_probabilities": _extremes(effect.log_probabilities, likely, texts),
    }


def _extremes(
    values: Tensor, among: Tensor, texts: Sequence[str]
) -> dict[str, list[tuple[str, float]]]:
    order: list[int] = among[values[among].argsort()].tolist()
    named = [(texts[token], float(values[token])) for token in order]
    return {
        "down": [pair for pair in named[:_LISTED] if pair[1] < 0],
        "up": [pair for pair in named[::-1][:_LISTED] if pair[1] > 0],
    }
