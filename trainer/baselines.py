"""What dictionaries are compared with: directions that no step of training made, in the same file and evaluation.

With k = 0 a baseline's activations are coordinates, of either sign, and all of them. With a k it keeps the k largest by
size, as the paper's "top-K" baselines do (arXiv 2309.08600, appendix on interpretability): each direction then stands
in the dictionary twice, once with either sign, so that activations are not negative.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.errors import BadConfig
from trainer.source import Source
from trainer.stop import Stop


def fit(config: TrainConfig, source: Source, stop: Stop) -> Dictionary:
    """The baseline that `config.architecture` names."""
    directions, mean = _KINDS[config.architecture](config, source, stop)
    if len(directions) < config.n_features:
        raise BadConfig(
            f"n_features is {config.n_features}; {config.architecture} has {len(directions)} of this model"
        )
    rows = directions[: config.n_features]
    if not config.k:
        parts = rows.T, torch.zeros(len(rows)), rows, mean
        return Dictionary(*parts, Activation.IDENTITY, center_input=True)
    both = torch.cat([rows, -rows])
    parts = both.T, torch.zeros(len(both)), both, mean
    return Dictionary(*parts, Activation.TOP_K, center_input=True, k=config.k)


def _random(config: TrainConfig, source: Source, stop: Stop) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    width = source.widths[Site.parse(config.site)]
    rows = torch.randn(config.n_features, width, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1), torch.zeros(width)


def _basis(config: TrainConfig, source: Source, stop: Stop) -> tuple[Tensor, Tensor]:
    width = source.widths[Site.parse(config.site)]
    return torch.eye(width), torch.zeros(width)


def _pca(config: TrainConfig, source: Source, stop: Stop) -> tuple[Tensor, Tensor]:
    """The principal components, largest first, and the mean, in float64 over all activations."""
    site = Site.parse(config.site)
    width = source.widths[site]
    count = 0
    total = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    with tqdm(desc="pca", total=source.count, unit=" tokens") as bar:
        for rows in source.pieces():
            stop.check("PCA starts anew")
            x = rows[site][0].double()
            count += len(x)
            total += x.sum(dim=0)
            products += x.T @ x
            bar.update(len(x))
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    return components.T.float().contiguous(), mean.float()


_KINDS: dict[str, Callable[[TrainConfig, Source, Stop], tuple[Tensor, Tensor]]] = {
    "random": _random,
    "basis": _basis,
    "pca": _pca,
}
