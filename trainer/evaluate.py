"""How good a dictionary is on held-out text."""

import math

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


class _Sums:
    """Over all kept activations."""

    def __init__(self, n_features: int, d_model: int) -> None:
        self.tokens = 0
        self.active = 0
        self.error = 0.0
        self.fired = torch.zeros(n_features, dtype=torch.int64, device=device())
        self.x = torch.zeros(d_model, dtype=torch.float64, device=device())
        self.xx = torch.zeros(d_model, d_model, dtype=torch.float64, device=device())

    def add(self, dictionary: Dictionary, x: Tensor) -> Tensor:
        """Counts `x`, tokens x d_model, and returns its reconstruction."""
        f = dictionary.encode(x)
        x_hat = dictionary.decode(f)
        self.tokens += len(x)
        self.active += int(torch.count_nonzero(f))
        self.error += (x - x_hat).double().square().sum().item()
        self.fired += torch.count_nonzero(f, dim=0)
        self.x += x.double().sum(dim=0)
        self.xx += x.double().T @ x.double()
        return x_hat

    def variances(self) -> Tensor:
        """Along the principal components, largest first."""
        mean = self.x / self.tokens
        covariance = self.xx / self.tokens - torch.outer(mean, mean)
        return torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0.0)


@torch.inference_mode()
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
    sums = _Sums(dictionary.n_features, dictionary.d_model)
    dictionary = dictionary.to(device())
    loss = {"plain": 0.0, "spliced": 0.0, "zeroed": 0.0}
    kl = 0.0
    targets = 0
    keep = torch.zeros(0)

    def see(x: Tensor) -> None:
        nonlocal keep
        keep = x.float().norm(dim=-1) <= max_norm
        keep[:, :skip_positions] = False
        if x.shape[-1] != dictionary.d_model:
            raise BadConfig(
                f"the dictionary is for x of width {dictionary.d_model}, that at {site} has {x.shape[-1]}"
            )

    def splice(x: Tensor) -> Tensor:
        spliced = x.clone()
        spliced[keep] = sums.add(dictionary, x[keep].float()).to(x.dtype)
        return spliced

    def zero(x: Tensor) -> Tensor:
        return x.masked_fill(keep[:, :, None], 0.0)

    with tqdm(desc="evaluate", total=contexts.numel(), unit=" tokens") as bar:
        for batch in contexts.long().split(_CONTEXTS):
            stop.check("the dictionary is trained, evaluation starts anew")
            plain: list[Tensor] = []
            for name, change in (("plain", see), ("spliced", splice), ("zeroed", zero)):
                with site_hook(model, site, change):
                    logits = model(input_ids=batch.to(device()), use_cache=False).logits
                loss[name] += _loss(logits, batch.to(device()), keep)
                if name == "plain":
                    plain = _log_probabilities(logits, keep)
                elif name == "spliced":
                    kl += _kl(plain, _log_probabilities(logits, keep))
            targets += int(keep[:, :-1].sum())
            bar.update(batch.numel())
    if not targets:
        raise BadCorpus("no held-out token is left to evaluate on")
    variances = sums.variances()
    l0 = sums.active / sums.tokens
    lost, whole = (loss[name] - loss["plain"] for name in ("spliced", "zeroed"))
    return Quality(
        tokens=sums.tokens,
        l0=l0,
        fvu=sums.error / sums.tokens / variances.sum().item(),
        delta_ce=lost / targets,
        dead_share=(sums.fired == 0).double().mean().item(),
        pca_fvu=(variances[round(l0) :].sum() / variances.sum()).item(),
        ce=loss["plain"] / targets,
        ce_recovered=1.0 - lost / whole if whole else None,
        kl=kl / targets,
        dense_share=(sums.fired > sums.tokens / 10).double().mean().item(),
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
