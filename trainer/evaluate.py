"""How good a dictionary is on held-out text."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from steer_server.dictionary.card import Quality
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.site import Site
from trainer.errors import BadCorpus
from trainer.model import device, site_hook
from trainer.stop import Stop

_CONTEXTS = 4


class _Sums:
    """Over all kept activations."""

    def __init__(self, n_features: int, d_model: int) -> None:
        self.tokens = 0
        self.active = 0
        self.error = 0.0
        self.fired = torch.zeros(n_features, dtype=torch.bool, device=device())
        self.x = torch.zeros(d_model, dtype=torch.float64, device=device())
        self.xx = torch.zeros(d_model, d_model, dtype=torch.float64, device=device())

    def add(self, dictionary: Dictionary, x: Tensor) -> Tensor:
        """Counts `x`, tokens x d_model, and returns its reconstruction."""
        f = dictionary.encode(x)
        x_hat = dictionary.decode(f)
        self.tokens += len(x)
        self.active += int(torch.count_nonzero(f))
        self.error += (x - x_hat).double().square().sum().item()
        self.fired |= (f != 0).any(dim=0)
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
    loss = {"plain": 0.0, "spliced": 0.0}
    targets = 0
    keep = torch.zeros(0)

    def see(x: Tensor) -> None:
        nonlocal keep
        keep = x.float().norm(dim=-1) <= max_norm
        keep[:, :skip_positions] = False

    def splice(x: Tensor) -> Tensor:
        spliced = x.clone()
        spliced[keep] = sums.add(dictionary, x[keep].float()).to(x.dtype)
        return spliced

    with tqdm(desc="evaluate", total=contexts.numel(), unit=" tokens") as bar:
        for batch in contexts.long().split(_CONTEXTS):
            stop.check("the dictionary is trained, evaluation starts anew")
            for name, change in (("plain", see), ("spliced", splice)):
                with site_hook(model, site, change):
                    logits = model(input_ids=batch.to(device()), use_cache=False).logits
                loss[name] += _loss(logits, batch.to(device()), keep)
            targets += int(keep[:, :-1].sum())
            bar.update(batch.numel())
    if not targets:
        raise BadCorpus("no held-out token is left to evaluate on")
    variances = sums.variances()
    l0 = sums.active / sums.tokens
    return Quality(
        tokens=sums.tokens,
        l0=l0,
        fvu=sums.error / sums.tokens / variances.sum().item(),
        delta_ce=(loss["spliced"] - loss["plain"]) / targets,
        dead_share=1.0 - sums.fired.double().mean().item(),
        pca_fvu=(variances[round(l0) :].sum() / variances.sum()).item(),
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
    return "\n".join(f"{name:<36}{value:>10}" for name, value in rows.items())


def _loss(logits: Tensor, tokens: Tensor, keep: Tensor) -> float:
    """Summed over the predictions made at kept positions."""
    keep = keep[:, :-1]
    chosen, target = logits[:, :-1][keep].float(), tokens[:, 1:][keep]
    return nn.functional.cross_entropy(chosen, target, reduction="sum").item()
