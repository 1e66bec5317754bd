"""What dictionaries are compared with: directions that no step of training made, in the same file and evaluation.

With k = 0 a baseline's activations are coordinates, of either sign, and all of them. With a k it keeps the k largest by
size, as the paper's "top-K" baselines do (arXiv 2309.08600, appendix on interpretability): each direction then stands
in the dictionary twice, once with either sign, so that activations are not negative. Rows of the decoder have unit norm.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from steer_server.dictionary.dictionary import Activation, Dictionary
from trainer.config import TrainConfig
from trainer.errors import BadConfig
from trainer.harvest import Activations
from trainer.model import load_tokenizer
from trainer.stop import Stop
from trainer.tagged import Tags, lay

_LEAST_EXAMPLES = 100
"""Of a class whose mean is worth knowing."""
_ICA_STEPS = 200


class Directions(NamedTuple):
    """Coordinates (x - mean) encoder^T, of which decoder makes x again."""

    encoder: Float[Tensor, "directions d_model"]
    decoder: Float[Tensor, "directions d_model"]
    mean: Float[Tensor, " d_model"]


def fit(config: TrainConfig, activations: Activations, stop: Stop) -> Dictionary:
    """The baseline that `config.architecture` names."""
    found = _KINDS[config.architecture](config, activations, stop)
    _check_count(config, len(found.decoder))
    encoder, decoder = (W[: config.n_features] for W in (found.encoder, found.decoder))
    if config.k:
        encoder, decoder = torch.cat([encoder, -encoder]), torch.cat([decoder, -decoder])
    kind = Activation.TOP_K if config.k else Activation.IDENTITY
    parts = encoder.T, torch.zeros(len(encoder)), decoder, found.mean
    return Dictionary(*parts, kind, center_input=True, k=config.k)


def names(config: TrainConfig, activations: Activations, stop: Stop) -> list[str]:
    """What each feature of a baseline stands for, where that is known: the classes of diff_mean."""
    if config.architecture != "diff_mean":
        return []
    classes = _classes(_tags(config, activations, stop))[: config.n_features]
    return [*classes, *(f"not {name}" for name in classes)] if config.k else classes


def _check_count(config: TrainConfig, there: int) -> None:
    if there < config.n_features:
        raise BadConfig(
            f"n_features is {config.n_features}; {config.architecture} has {there} of this model and corpus"
        )


def _random(config: TrainConfig, activations: Activations, stop: Stop) -> Directions:
    generator = torch.Generator().manual_seed(config.seed)
    rows = normalize(
        torch.randn(config.n_features, activations.d_model, generator=generator), dim=1
    )
    return Directions(rows, rows, torch.zeros(activations.d_model))


def _basis(config: TrainConfig, activations: Activations, stop: Stop) -> Directions:
    rows = torch.eye(activations.d_model)
    return Directions(rows, rows, torch.zeros(activations.d_model))


def _pca(config: TrainConfig, activations: Activations, stop: Stop) -> Directions:
    """The principal components, largest first, and the mean, in float64 over all shards."""
    d_model = activations.d_model
    total = torch.zeros(d_model, dtype=torch.float64)
    products = torch.zeros(d_model, d_model, dtype=torch.float64)
    for shard in tqdm(activations.shards, desc="pca", unit=" shards"):
        stop.check("PCA starts anew")
        x = shard.double()
        total += x.sum(dim=0)
        products += x.T @ x
    mean = total / activations.count
    covariance = products / activations.count - torch.outer(mean, mean)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1).T.float().contiguous()
    return Directions(components, components, mean.float())


def _ica(config: TrainConfig, activations: Activations, stop: Stop) -> Directions:
    """scikit-learn's FastICA of `ica_rows` activations, its whitening folded in, most variance first."""
    try:
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise BadConfig("ica needs scikit-learn: pip install 'steer[probe]'") from error
    _check_count(config, min(activations.d_model, activations.count, config.ica_rows))
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(activations.count, generator=generator)[: config.ica_rows]
    x = activations.gather(chosen.sort().values).numpy()
    with tqdm(desc="ica", total=_ICA_STEPS, unit=" steps") as bar:

        def log_cosh(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """As FastICA's own, with a word on how far it is."""
            stop.check("ICA starts anew")
            bar.update()
            np.tanh(s, s)
            return s, np.array([1 - np.square(row).mean() for row in s], dtype=s.dtype)

        ica: Any = FastICA(
            config.n_features,
            fun=cast(Any, log_cosh),
            max_iter=_ICA_STEPS,
            random_state=config.seed,
            whiten="unit-variance",
        )
        with warnings.catch_warnings(), threadpool_limits(config.threads):
            warnings.simplefilter("ignore", ConvergenceWarning)
            ica.fit(x)
        bar.set_postfix_str("not converged" if ica.n_iter_ == _ICA_STEPS else "converged")
    mixing = torch.from_numpy(ica.mixing_.T.copy())
    strength, order = mixing.norm(dim=1).sort(descending=True)
    encoder = torch.from_numpy(ica.components_)[order] * strength[:, None]
    return Directions(encoder, normalize(mixing[order], dim=1), torch.from_numpy(ica.mean_))


def _diff_mean(config: TrainConfig, activations: Activations, stop: Stop) -> Directions:
    """For each class of tagged tokens, from the mean of all others to its own; most frequent class first."""
    tags = _tags(config, activations, stop)
    of = tags.of.flatten().long()
    sums = torch.zeros(len(tags.classes), activations.d_model, dtype=torch.float64)
    counts = torch.zeros(len(tags.classes), dtype=torch.float64)
    for x, rows in zip(activations.shards, activations.rows, strict=True):
        label = of[rows.long()]
        sums.index_add_(0, label[label >= 0], x[label >= 0].double())
        counts += torch.bincount(label[label >= 0], minlength=len(counts))
    total, count = sums.sum(dim=0), counts.sum()
    used = slice(len(_classes(tags)))
    own = sums[used] / counts[used, None]
    others = (total - sums[used]) / (count - counts[used])[:, None]
    rows = normalize(own - others, dim=1).float()
    return Directions(rows, rows, (total / count).float())


def _tags(config: TrainConfig, activations: Activations, stop: Stop) -> Tags:
    return lay(activations.train, config.corpus, load_tokenizer(config.model), stop)


def _classes(tags: Tags) -> list[str]:
    pairs = zip(tags.classes, tags.counts(), strict=True)
    return [name for name, count in pairs if count >= _LEAST_EXAMPLES]


_KINDS: dict[str, Callable[[TrainConfig, Activations, Stop], Directions]] = {
    "random": _random,
    "basis": _basis,
    "pca": _pca,
    "ica": _ica,
    "diff_mean": _diff_mean,
}
