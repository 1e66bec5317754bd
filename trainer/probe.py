"""k-sparse probing: how well a class of words can be told from a few features (arXiv 2305.01610).

Each class of a tagged corpus against all other tagged tokens. Train and test tokens are of different documents: the
corpus's training and held-out ones, as in a training, so that no dictionary has seen the test documents. The k features
are those whose means differ most between the classes, in units of the feature's deviation, on training tokens; a logistic
regression on them is fitted there and measured on test tokens, with the threshold of the best F1 on training tokens. Beside it stand the same with k of the stream's own
coordinates, a logistic regression on all coordinates, and the difference of means on them. All are standardised first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from trainer.config import TrainConfig
from trainer.errors import BadConfig, BadCorpus
from trainer.model import load_model, load_tokenizer, read_sites, truncate
from trainer.stop import Stop
from trainer.tagged import Tags, lay
from trainer.tokens import pack

KS = (1, 2, 5, 16)
_LEAST_TRAIN, _LEAST_TEST = 200, 50
"""Tokens of a class that is probed for."""
_CONTEXTS = 8
_ROWS = 8192
_STEPS = 1000
"""Of a regression, at most."""
Encode = Callable[[Tensor, Sequence[int]], Tensor]
"""The activations of some features, tokens x features."""


class Score(NamedTuple):
    """On test tokens."""

    f1: float
    auroc: float
    accuracy: float
    """Balanced: the mean of both classes' shares that are told rightly."""


class Probe(NamedTuple):
    """One row of the table."""

    dictionary: str
    """A folder, or what it is compared with: `coordinates`, `all coordinates`, `difference of means`."""
    site: str
    tag: str
    k: int
    """Features or coordinates used; 0 for all."""
    features: tuple[int, ...]
    score: Score
    test_tokens: int
    test_share: float
    """Of test tokens that are of the class."""


class _Split(NamedTuple):
    x: Tensor
    """float32, tokens x d_model."""
    tag: Tensor
    """int16, of each token."""


class _Pair(NamedTuple):
    """Of training and of test tokens."""

    train: np.ndarray
    test: np.ndarray


class _Site(NamedTuple):
    site: Site
    train: _Split
    test: _Split


def probe(
    stored: Sequence[StoredDictionary],
    config: TrainConfig,
    tags: Sequence[str],
    ks: Sequence[int],
    stop: Stop,
) -> list[Probe]:
    """`config` says of what model, corpus, contexts and how many tokens; no `tags` stands for all with enough examples."""
    limits = _library()
    if len({entry.card.model for entry in stored}) > 1:
        raise BadConfig("the dictionaries are of different models; probe those of one at a time")
    sites = sorted({entry.card.site for entry in stored})
    bounds = {
        site: min(_bound(entry) for entry in stored if entry.card.site == site) for site in sites
    }
    found, names = _read(config, bounds, stop)
    chosen = _chosen(names, found[0], tags)
    rows: list[Probe] = []
    probes = len(chosen) * (len(stored) * len(ks) + len(sites) * (len(ks) + 2))
    with tqdm(desc="probe", total=probes, unit=" probes") as bar, limits(config.threads):
        for here in found:
            own = [entry for entry in stored if entry.card.site == here.site]
            for row in _site_rows(here, own, names, chosen, ks):
                stop.check("nothing of the probing is kept")
                rows.append(row)
                bar.update()
    return rows


def table(rows: Sequence[Probe]) -> str:
    """Markdown: the mean over all classes first, then each class."""
    lines = [
        "| tag | dictionary | site | k | F1 | AUROC | balanced accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, int], list[Score]] = {}
    for row in rows:
        groups.setdefault((row.dictionary, row.site, row.k), []).append(row.score)
    for (dictionary, site, k), scores in groups.items():
        lines.append(_line("mean", dictionary, site, k, Score(*np.mean(scores, axis=0))))
    order = {tag: number for number, tag in enumerate(dict.fromkeys(row.tag for row in rows))}
    for row in sorted(rows, key=lambda row: order[row.tag]):
        lines.append(_line(row.tag, row.dictionary, row.site, row.k, row.score))
    return "\n".join(lines)


def as_json(rows: Sequence[Probe], config: TrainConfig) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "corpus": dict(config.corpus),
        "train_tokens": config.tokens,
        "test_tokens": config.eval_tokens,
        "probes": [row._asdict() | {"score": row.score._asdict()} for row in rows],
    }


def _line(tag: str, dictionary: str, site: str, k: int, score: Score) -> str:
    numbers = " | ".join(f"{value:.3f}" for value in score)
    return f"| {tag} | {dictionary} | {site} | {k or 'all'} | {numbers} |"


def _library() -> Callable[[int], AbstractContextManager[Any]]:
    """What bounds the threads of scikit-learn, if that is there."""
    try:
        import sklearn  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise BadConfig("probe needs scikit-learn: pip install 'steer[probe]'") from error
    return threadpool_limits


def _bound(entry: StoredDictionary) -> float:
    """Activations longer than this are not what the dictionary is about."""
    return float(entry.card.training.get("max_norm", torch.finfo(torch.float32).max))


@torch.inference_mode()
def _read(
    config: TrainConfig, bounds: dict[Site, float], stop: Stop
) -> tuple[list[_Site], list[str]]:
    """Tagged tokens' activations at each site, and the classes' names."""
    tokenizer = load_tokenizer(config.model)
    contexts = pack(config, tokenizer, stop)
    both = torch.cat([contexts["train"], contexts["heldout"]])
    tags = lay(both, config.corpus, tokenizer, stop)
    sites = list(bounds)
    model = truncate(load_model(config.model, config.weights, config.data_seed), sites)
    first_test = len(contexts["train"])
    parts: dict[Site, tuple[list[_Split], list[_Split]]] = {site: ([], []) for site in sites}
    with tqdm(desc="read", total=both.numel(), unit=" tokens") as bar:
        for start, batch, labels in _batches(both, tags, first_test):
            stop.check("nothing of the probing is kept")
            for site, x in zip(sites, read_sites(model, sites, batch), strict=True):
                x = x.float().cpu()
                keep = (labels >= 0) & (x.norm(dim=-1) <= bounds[site])
                keep[:, : config.skip_positions] = False
                parts[site][start >= first_test].append(_Split(x[keep], labels[keep]))
            bar.update(batch.numel())
    return [_Site(site, *map(_joined, parts[site])) for site in sites], tags.classes


def _batches(contexts: Tensor, tags: Tags, first_test: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of training contexts or of test contexts, none of both."""
    for first, last in ((0, first_test), (first_test, len(contexts))):
        for start in range(first, last, _CONTEXTS):
            here = slice(start, min(start + _CONTEXTS, last))
            yield start, contexts[here], tags.of[here]


def _joined(parts: Sequence[_Split]) -> _Split:
    return _Split(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _chosen(names: list[str], site: _Site, tags: Sequence[str]) -> list[int]:
    counts = [
        torch.bincount(split.tag.long(), minlength=len(names)) for split in (site.train, site.test)
    ]
    enough = (counts[0] >= _LEAST_TRAIN) & (counts[1] >= _LEAST_TEST)
    there = [name for number, name in enumerate(names) if enough[number]]
    unknown = [tag for tag in tags if tag not in there]
    if unknown or not there:
        raise BadCorpus(
            f"no {' or '.join(unknown) or 'class'} with {_LEAST_TRAIN} training and {_LEAST_TEST} test tokens; "
            f"there are {', '.join(there) or 'none'}: take more with --train-tokens and --test-tokens"
        )
    wanted = tags or [name for name in there if name.isalpha()]
    return [names.index(name) for name in wanted]


def _site_rows(
    here: _Site,
    stored: Sequence[StoredDictionary],
    names: list[str],
    chosen: Sequence[int],
    ks: Sequence[int],
) -> Iterator[Probe]:
    train, test = here.train, here.test
    sets: list[tuple[str, Encode]] = [("coordinates", _coordinates)]
    sets += [(str(entry.folder), entry.dictionary.encode_features) for entry in stored]
    widths = [train.x.shape[1], *(entry.card.n_features for entry in stored)]
    best = {
        name: _best(encode, width, train, chosen, max(ks))
        for (name, encode), width in zip(sets, widths, strict=True)
    }
    columns = {
        name: [_columns(encode, split.x, best[name].unique()) for split in (train, test)]
        for name, encode in sets
    }
    whole = _Pair(*(_standard(train.x.numpy(), split.x.numpy()) for split in (train, test)))
    for number, tag in enumerate(chosen):
        y = _Pair(*(split.tag.numpy() == tag for split in (train, test)))
        share = float(y.test.mean())

        def row(
            name: str,
            k: int,
            features: Sequence[int],
            score: Score,
            tag: int = tag,
            share: float = share,
        ) -> Probe:
            about = (name, str(here.site), names[tag], k, tuple(features))
            return Probe(*about, score, len(test.tag), share)

        yield row("all coordinates", 0, (), _regression(whole, y))
        yield row("difference of means", 0, (), _difference(whole, y))
        for name, _ in sets:
            kept = best[name].unique().tolist()
            for k in ks:
                features = best[name][number, :k].tolist()
                places = [kept.index(feature) for feature in features]
                x = _Pair(
                    *(_standard(columns[name][0][:, places], f[:, places]) for f in columns[name])
                )
                yield row(name, k, features, _regression(x, y))


def _coordinates(x: Tensor, features: Sequence[int]) -> Tensor:
    """The basis as a dictionary."""
    return x[:, list(features)]


def _best(encode: Encode, width: int, train: _Split, chosen: Sequence[int], most: int) -> Tensor:
    """Of each class the features with the largest difference of means, in their deviations, [classes, most]."""
    if most > width:
        raise BadConfig(f"k is {most}, but a dictionary has {width} features")
    every = range(width)
    sums = torch.zeros(int(train.tag.max()) + 1, width, dtype=torch.float64)
    squares = torch.zeros(width, dtype=torch.float64)
    for x, tag in zip(train.x.split(_ROWS), train.tag.split(_ROWS), strict=True):
        f = encode(x, every).double()
        sums.index_add_(0, tag.long(), f)
        squares += f.square().sum(dim=0)
    counts = torch.bincount(train.tag.long()).double()[:, None]
    total, count = sums.sum(dim=0), counts.sum()
    deviation = (squares / count - (total / count).square()).clamp(min=0.0).sqrt()
    own = sums[chosen] / counts[chosen]
    others = (total - sums[chosen]) / (count - counts[chosen])
    difference = (own - others).abs() / deviation.clamp(min=1e-9)
    # Equal ones, such as those that are never active, by number.
    return difference.sort(dim=1, descending=True, stable=True).indices[:, :most]


def _columns(encode: Encode, x: Tensor, features: Tensor) -> np.ndarray:
    parts = [encode(part, features.tolist()) for part in x.split(_ROWS)]
    return torch.cat(parts).numpy()


def _standard(train: np.ndarray, x: np.ndarray) -> np.ndarray:
    """In units of the training tokens' deviations from their mean."""
    from sklearn.preprocessing import StandardScaler

    return np.asarray(StandardScaler().fit(train).transform(x))


def _regression(x: _Pair, y: _Pair) -> Score:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=_STEPS).fit(x.train, y.train)
    return _score(_Pair(*map(fitted.decision_function, x)), y)


def _difference(x: _Pair, y: _Pair) -> Score:
    direction = x.train[y.train].mean(axis=0) - x.train[~y.train].mean(axis=0)
    return _score(_Pair(x.train @ direction, x.test @ direction), y)


def _score(scores: _Pair, y: _Pair) -> Score:
    """With the threshold of the best F1 on training tokens."""
    from sklearn.metrics import (
        balanced_accuracy_score,
        f1_score,
        precision_recall_curve,
        roc_auc_score,
    )

    precision, recall, thresholds = precision_recall_curve(y.train, scores.train)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    told = scores.test >= thresholds[f1[:-1].argmax()]
    return Score(
        float(f1_score(y.test, told)),
        float(roc_auc_score(y.test, scores.test)),
        float(balanced_accuracy_score(y.test, told)),
    )
