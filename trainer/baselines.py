"""What dictionaries are compared with: directions that no step of training made, in the same file and evaluation.

With k = 0 a baseline's activations are coordinates, of either sign, and all of them. With a k it keeps the k largest by
size, as the paper's "top-K" baselines do (arXiv 2309.08600, appendix on interpretability): each direction then stands
in the dictionary twice, once with either sign, so that activations are not negative. Rows of the decoder have unit norm.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.errors import BadConfig
from trainer.model import load_tokenizer
from trainer.source import Source
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


def fit(
    config: TrainConfig, source: Source, stop: Stop, known: dict[str, Directions] | None = None
) -> Dictionary:
    """The baseline that `config.architecture` names.

    Those that differ in k alone have their directions in common: `known` keeps them for the next.
    """
    known = {} if known is None else known
    shared = replace(config, k=0, out="").digest([field.name for field in fields(config)])
    if shared not in known:
        known[shared] = _KINDS[config.architecture](config, source, stop)
    found = known[shared]
    _check_count(config, len(found.decoder))
    encoder, decoder = (W[: config.n_features] for W in (found.encoder, found.decoder))
    if config.k:
        encoder, decoder = torch.cat([encoder, -encoder]), torch.cat([decoder, -decoder])
    kind = Activation.TOP_K if config.k else Activation.IDENTITY
    parts = encoder.T, torch.zeros(len(encoder)), decoder, found.mean
    return Dictionary(*parts, kind, center_input=True, k=config.k)


def names(config: TrainConfig, source: Source, stop: Stop) -> list[str]:
    """What each feature of a baseline stands for, where that is known: the classes of diff_mean."""
    if config.architecture != "diff_mean":
        return []
    classes = _classes(_tags(config, source, stop))[: config.n_features]
    return [*classes, *(f"not {name}" for name in classes)] if config.k else classes


def _check_count(config: TrainConfig, there: int) -> None:
    if there < config.n_features:
        raise BadConfig(
            f"n_features is {config.n_features}; {config.architecture} has {there} of this model and corpus"
        )


def _random(config: TrainConfig, source: Source, stop: Stop) -> Directions:
    generator = torch.Generator().manual_seed(config.seed)
    width = _width(config, source)
    rows = normalize(torch.randn(config.n_features, width, generator=generator), dim=1)
    return Directions(rows, rows, torch.zeros(width))


def _basis(config: TrainConfig, source: Source, stop: Stop) -> Directions:
    rows = torch.eye(_width(config, source))
    return Directions(rows, rows, torch.zeros(len(rows)))


def _pca(config: TrainConfig, source: Source, stop: Stop) -> Directions:
    """The principal components, largest first, and the mean, in float64 over all activations."""
    width, count = _width(config, source), 0
    total = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    for rows, _ in _read(config, source, stop, "PCA"):
        x = rows.double()
        count += len(x)
        total += x.sum(dim=0)
        products += x.T @ x
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1).T.float().contiguous()
    return Directions(components, components, mean.float())


def _width(config: TrainConfig, source: Source) -> int:
    return source.widths[Site.parse(config.site)]


def _read(
    config: TrainConfig, source: Source, stop: Stop, name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """All activations of the site and their places, in pieces."""
    with tqdm(desc=name, total=source.count, unit=" tokens") as bar:
        for piece in source.pieces():
            stop.check(f"{name} starts anew")
            x, places = piece[Site.parse(config.site)]
            yield x, places
            bar.update(len(x))


def _ica(config: TrainConfig, source: Source, stop: Stop) -> Directions:
    """scikit-learn's FastICA of `ica_rows` activations, its whitening folded in, most variance first."""
    try:
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise BadConfig("ica needs scikit-learn: pip install 'steer[probe]'") from error
    _check_count(config, min(_width(config, source), source.count, config.ica_rows))
    x = _sample(config, source, stop).numpy()
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


def _sample(config: TrainConfig, source: Source, stop: Stop) -> Tensor:
    """At most `ica_rows` activations, drawn at random."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.zeros(source.count, dtype=torch.bool)
    chosen[torch.randperm(source.count, generator=generator)[: config.ica_rows]] = True
    found, seen = [], 0
    for x, _ in _read(config, source, stop, "ICA's sample"):
        found.append(x[chosen[seen : seen + len(x)]].float())
        seen += len(x)
    return torch.cat(found)


def _diff_mean(config: TrainConfig, source: Source, stop: Stop) -> Directions:
    """For each class of tagged tokens, from the mean of all others to its own; most frequent class first."""
    tags = _tags(config, source, stop)
    of = tags.of.flatten().long()
    sums = torch.zeros(len(tags.classes), _width(config, source), dtype=torch.float64)
    counts = torch.zeros(len(tags.classes), dtype=torch.float64)
    for x, places in _read(config, source, stop, "difference of means"):
        label = of[places]
        sums.index_add_(0, label[label >= 0], x[label >= 0].double())
        counts += torch.bincount(label[label >= 0], minlength=len(counts))
    total, count = sums.sum(dim=0), counts.sum()
    used = slice(len(_classes(tags)))
    own = sums[used] / counts[used, None]
    others = (total - sums[used]) / (count - counts[used])[:, None]
    rows = normalize(own - others, dim=1).float()
    return Directions(rows, rows, (total / count).float())


def _tags(config: TrainConfig, source: Source, stop: Stop) -> Tags:
    return lay(source.train, config.corpus, load_tokenizer(config.model), stop)


def _classes(tags: Tags) -> list[str]:
    pairs = zip(tags.classes, tags.counts(), strict=True)
    return [name for name, count in pairs if count >= _LEAST_EXAMPLES]


_KINDS: dict[str, Callable[[TrainConfig, Source, Stop], Directions]] = {
    "random": _random,
    "basis": _basis,
    "pca": _pca,
    "ica": _ica,
    "diff_mean": _diff_mean,
}
