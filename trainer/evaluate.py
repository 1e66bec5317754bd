"""How good a dictionary is on held-out text."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from steer_server.dictionary.card import Quality
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.site import Site
from trainer.errors import BadConfig, BadCorpus
from trainer.model import device, site_hook
from trainer.stop import Stop

_CONTEXTS = 4


class _Activations:
    """Moments of all kept ones."""

    def __init__(self, d_model: int) -> None:
        self.tokens = 0
        self.x = torch.zeros(d_model, dtype=torch.float64, device=device())
        self.xx = torch.zeros(d_model, d_model, dtype=torch.float64, device=device())

    def add(self, x: Tensor) -> None:
        """`x`: tokens x d_model."""
        self.tokens += len(x)
        self.x += x.double().sum(dim=0)
        self.xx += x.double().T @ x.double()

    def variances(self) -> Tensor:
        """Along the principal components, largest first."""
        mean = self.x / self.tokens
        covariance = self.xx / self.tokens - torch.outer(mean, mean)
        return torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0.0)


class _Candidate:
    """A dictionary, and what it does over all kept activations."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary.to(device())
        self.active = 0
        self.error = 0.0
        self.fired = torch.zeros(dictionary.n_features, dtype=torch.int64, device=device())
        self.loss = 0.0
        self.kl = 0.0

    def reconstructed(self, x: Tensor) -> Tensor:
        """Counts `x`, tokens x d_model."""
        f = self.dictionary.encode(x)
        x_hat = self.dictionary.decode(f)
        self.active += int(torch.count_nonzero(f))
        self.error += (x - x_hat).double().square().sum().item()
        self.fired += torch.count_nonzero(f, dim=0)
        return x_hat


def evaluate(
    model: nn.Module,
    site: Site,
    dictionary: Dictionary,
    contexts: Tensor,
    skip_positions: int,
    max_norm: float,
    stop: Stop,
) -> Quality:
    """Quality on `contexts`; the activations that training left out stay as they are.

    The PCA it is compared with is fitted to these very activations, which flatters PCA.
    """
    return evaluate_together(model, site, [dictionary], contexts, skip_positions, max_norm, stop)[0]


@torch.inference_mode()
def evaluate_together(
    model: nn.Module,
    site: Site,
    dictionaries: Sequence[Dictionary],
    contexts: Tensor,
    skip_positions: int,
    max_norm: float,
    stop: Stop,
) -> list[Quality]:
    """`evaluate` of each: the model runs once for every one, and twice for all."""
    candidates = [_Candidate(dictionary) for dictionary in dictionaries]
    d_model = dictionaries[0].d_model
    activations = _Activations(d_model)
    plain_loss = zeroed_loss = 0.0
    targets = 0
    keep = torch.zeros(0)

    def see(x: Tensor) -> None:
        nonlocal keep
        if x.shape[-1] != d_model:
            raise BadConfig(
                f"the dictionary is for x of width {d_model}, that at {site} has {x.shape[-1]}"
            )
        keep = x.float().norm(dim=-1) <= max_norm
        keep[:, :skip_positions] = False
        activations.add(x[keep].float())

    def zero(x: Tensor) -> Tensor:
        return x.masked_fill(keep[:, :, None], 0.0)

    def splice(x: Tensor, candidate: _Candidate) -> Tensor:
        spliced = x.clone()
        spliced[keep] = candidate.reconstructed(x[keep].float()).to(x.dtype)
        return spliced

    def logits(tokens: Tensor, change: Callable[[Tensor], Tensor | None]) -> Tensor:
        with site_hook(model, site, change):
            return model(input_ids=tokens, use_cache=False).logits

    with tqdm(desc="evaluate", total=contexts.numel(), unit=" tokens") as bar:
        for batch in contexts.long().split(_CONTEXTS):
            stop.check("the dictionary is trained, evaluation starts anew")
            tokens = batch.to(device())
            unchanged = logits(tokens, see)
            plain_loss += _loss(unchanged, tokens, keep)
            plain = _log_probabilities(unchanged, keep)
            zeroed_loss += _loss(logits(tokens, zero), tokens, keep)
            for candidate in candidates:
                changed = logits(tokens, partial(splice, candidate=candidate))
                candidate.loss += _loss(changed, tokens, keep)
                candidate.kl += _kl(plain, _log_probabilities(changed, keep))
            targets += int(keep[:, :-1].sum())
            bar.update(batch.numel())
    if not targets:
        raise BadCorpus("no held-out token is left to evaluate on")
    return [
        _quality(candidate, activations, plain_loss, zeroed_loss, targets)
        for candidate in candidates
    ]


def _quality(
    candidate: _Candidate,
    activations: _Activations,
    plain_loss: float,
    zeroed_loss: float,
    targets: int,
) -> Quality:
    tokens = activations.tokens
    variances = activations.variances()
    l0 = candidate.active / tokens
    lost, whole = candidate.loss - plain_loss, zeroed_loss - plain_loss
    return Quality(
        tokens=tokens,
        l0=l0,
        fvu=candidate.error / tokens / variances.sum().item(),
        delta_ce=lost / targets,
        dead_share=(candidate.fired == 0).double().mean().item(),
        pca_fvu=(variances[round(l0) :].sum() / variances.sum()).item(),
        ce=plain_loss / targets,
        ce_recovered=1.0 - lost / whole if whole else None,
        kl=candidate.kl / targets,
        dense_share=(candidate.fired > tokens / 10).double().mean().item(),
    )


def describe(quality: Quality) -> str:
    """The figures as printed after training and by `python -m trainer evaluate`."""
    rows = {
        "held-out tokens": f"{quality.tokens:,}",
        "L0, active features per token": f"{quality.l0:.1f}",
        "FVU, variance unexplained": f"{quality.fvu:.3f}",
        f"FVU of PCA with {round(quality.l0)} components": f"{quality.pca_fvu:.3f}",
        "delta-CE, nats per token": f"{quality.delta_ce:.3f}",
        "features active on no token": f"{quality.dead_share:.1%}",
    }
    if quality.ce is not None:
        rows |= {
            "features active on a tenth of them": f"{quality.dense_share:.1%}",
            "CE recovered, of what 0 loses": "none"
            if quality.ce_recovered is None
            else f"{quality.ce_recovered:.3f}",
            "KL, nats per token": f"{quality.kl:.3f}",
            "perplexity without x_hat": f"{math.exp(quality.ce):.2f}",
            "perplexity with x_hat": f"{math.exp(quality.ce + quality.delta_ce):.2f}",
        }
    return "\n".join(f"{name:<36}{value:>10}" for name, value in rows.items())


def _loss(logits: Tensor, tokens: Tensor, keep: Tensor) -> float:
    """Summed over the predictions made at kept positions."""
    keep = keep[:, :-1]
    chosen, target = logits[:, :-1][keep].float(), tokens[:, 1:][keep]
    return nn.functional.cross_entropy(chosen, target, reduction="sum").item()


def _log_probabilities(logits: Tensor, keep: Tensor) -> list[Tensor]:
    """Of the predictions made at kept positions; a context at a time, because a vocabulary is wide."""
    pairs = zip(logits[:, :-1], keep[:, :-1], strict=True)
    return [context[kept].float().log_softmax(dim=-1) for context, kept in pairs]


def _kl(plain: list[Tensor], changed: list[Tensor]) -> float:
    """sum KL(plain | changed)."""
    return sum(
        nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
        for p, q in zip(plain, changed, strict=True)
    )
