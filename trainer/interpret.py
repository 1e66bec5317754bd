"""What each feature responds to and what it does: statistics, top examples, logit effects."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import QUANTILES, Evidence, Example, FeatureStatistics
from steer_server.dictionary.site import Site
from trainer.errors import BadConfig
from trainer.source import Source
from trainer.stop import Stop
from trainer.structure import decoder_layers, place

# What a person needs to guess a label, at some 500 bytes a feature: a dictionary is to be copied.
EXAMPLES = 3
# The strongest contexts often peak at one and the same word, which hides what a feature is about;
# so examples are picked from this many with different words first.
CANDIDATES = 16
BEFORE, AFTER = 6, 2
LOGITS = 3
# Tokens seen less often than this in the harvest are not listed among logit effects: their badly
# trained unembeddings are long, and would crowd out every other token at every feature.
COMMON = 10
# Quantiles come from histograms on a log scale: bins are 2.2% wide, from 2^-10 to 2^20.
_BINS_PER_OCTAVE, _LOW_OCTAVE, _OCTAVES = 32, -10, 30
_BINS = _BINS_PER_OCTAVE * _OCTAVES


class Survey:
    """Statistics and the contexts of the strongest activations, in one pass over activations."""

    def __init__(self, dictionary: Dictionary) -> None:
        F = dictionary.n_features
        self.dictionary = dictionary
        self.tokens = 0
        self.sum = torch.zeros(F, dtype=torch.float64)
        self.max = torch.zeros(F)
        self.bins = torch.zeros(F * _BINS, dtype=torch.int64)
        self.top = torch.zeros(0, F)
        self.top_contexts = torch.zeros(0, F, dtype=torch.int64)

    def add(self, x: Tensor, rows: Tensor, length: int) -> None:
        """Activations of whole contexts; `rows` are their places.

        Of activations that may be negative, such as coordinates, only those above 0 are looked at.
        """
        if not len(x):
            return
        f = self.dictionary.encode(x).clamp_(min=0.0)
        self.tokens += len(x)
        self.sum += f.sum(dim=0, dtype=torch.float64)
        at, feature = f.nonzero(as_tuple=True)
        octaves = f[at, feature].log2() - _LOW_OCTAVE
        slot = (octaves * _BINS_PER_OCTAVE).long().clamp(0, _BINS - 1)
        self.bins += torch.bincount(feature * _BINS + slot, minlength=len(self.bins))
        contexts, place = (rows.long() // length).unique(return_inverse=True)
        peak = torch.stack([f[place == number].amax(dim=0) for number in range(len(contexts))])
        self.max = torch.maximum(self.max, peak.amax(dim=0))
        self._keep_top(peak, contexts[:, None].expand_as(peak))

    def statistics(self) -> FeatureStatistics:
        """Over everything added."""
        bins = self.bins.view(-1, _BINS)
        count = bins.sum(dim=1)
        reached = bins.cumsum(dim=1)
        edges = torch.arange(_BINS) + 0.5
        middles = torch.exp2(edges / _BINS_PER_OCTAVE + _LOW_OCTAVE)
        wanted = (count[:, None] * torch.tensor(QUANTILES)).ceil().clamp(min=1).long()
        slots = torch.searchsorted(reached, wanted).clamp(max=_BINS - 1)
        table = torch.minimum(middles[slots], self.max[:, None])
        fired = count > 0
        return FeatureStatistics(
            density=(count.double() / self.tokens).float(),
            mean=torch.where(fired, self.sum / count.clamp(min=1), 0.0).float(),
            max=self.max,
            quantiles=torch.where(fired[:, None], table, 0.0),
        )

    def _keep_top(self, peak: Tensor, contexts: Tensor) -> None:
        values = torch.cat([self.top, peak])
        best = values.topk(min(CANDIDATES, len(values)), dim=0)
        self.top = best.values
        self.top_contexts = torch.cat([self.top_contexts, contexts]).gather(0, best.indices)


@torch.inference_mode()
def surveys(
    dictionaries: Sequence[tuple[Site, Dictionary]], source: Source, stop: Stop
) -> list[Survey]:
    """Of each dictionary over all training activations of its site, which are read once."""
    found = [Survey(dictionary) for _, dictionary in dictionaries]
    length = source.train.shape[1]
    with tqdm(desc="statistics", total=source.count, unit=" tokens") as bar:
        for rows in source.pieces():
            stop.check("the dictionary is trained, its statistics start anew")
            for survey, (site, _) in zip(found, dictionaries, strict=True):
                x, places = rows[site]
                survey.add(x.float(), places, length)
            bar.update(max(len(x) for x, _ in rows.values()))
    return found


@torch.inference_mode()
def examples(
    dictionaries: Sequence[tuple[Site, Survey]], source: Source, texts: list[str], stop: Stop
) -> list[dict[int, list[Example]]]:
    """Of each survey, by feature: the strongest activations in context, strongest first."""
    length = source.train.shape[1]
    firing = [(survey.top > 0).nonzero(as_tuple=True) for _, survey in dictionaries]
    at = [
        survey.top_contexts[fired] for (_, survey), fired in zip(dictionaries, firing, strict=True)
    ]
    found: list[dict[int, dict[int, Example]]] = [{} for _ in dictionaries]
    numbers = torch.cat(at).unique().tolist()
    for number, rows in zip(numbers, source.contexts(numbers), strict=True):
        stop.check("the dictionary is trained, its evidence starts anew")
        for own, (site, survey), (rank, feature), context in zip(
            found, dictionaries, firing, at, strict=True
        ):
            here = context == number
            x, places = rows[site]
            f = survey.dictionary.rows.take(feature[here]).encode(x.float())
            for column, (of, level) in enumerate(
                zip(feature[here].tolist(), rank[here].tolist(), strict=True)
            ):
                values = torch.zeros(length)
                values[places % length] = f[:, column]
                own.setdefault(of, {})[level] = _window(values, source.train[number], texts)
    return [
        {of: _varied([ranked[level] for level in sorted(ranked)]) for of, ranked in own.items()}
        for own in found
    ]


@torch.inference_mode()
def evidence(
    site: Site,
    dictionary: Dictionary,
    examples: Mapping[int, list[Example]],
    train: Tensor,
    model: nn.Module,
    texts: list[str],
    stop: Stop,
) -> list[Evidence]:
    """Of every feature with examples: those, and its logit effects; `train` are the training contexts."""
    entries: list[Evidence] = []
    counts = torch.bincount(train.flatten(), minlength=len(texts))
    common = (counts >= COMMON).nonzero().squeeze(1)
    listed = min(LOGITS, len(common))
    for start in range(0, dictionary.n_features, 256):
        stop.check("the dictionary is trained, its evidence starts anew")
        effects = logit_effects(model, site, dictionary.W_dec[start : start + 256])[:, common]
        up, down = effects.topk(listed), effects.topk(listed, largest=False)
        for number in range(len(effects)):
            feature = start + number
            if feature in examples:
                entries.append(
                    Evidence(
                        feature,
                        examples=tuple(examples[feature]),
                        logits_up=_named(up.values[number], common[up.indices[number]], texts),
                        logits_down=_named(
                            down.values[number], common[down.indices[number]], texts
                        ),
                    )
                )
    return entries


def logit_effects(model: nn.Module, site: Site, directions: Tensor) -> Tensor:
    """Logits that each direction at the site alone gives through the final norm and the head, less those of 0.

    A direction inside a sublayer goes through the output projection first, and what a sublayer returns through the norm
    that the layer puts behind it, if it does.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    probe = torch.cat([directions, torch.zeros_like(directions[:1])]).to(head.weight)
    for module in place(model, site).to_stream:
        probe = module(probe)
        probe = probe - probe[-1]
    logits = head(_final_norm(model)(probe)).float()
    return (logits[:-1] - logits[-1]).cpu()


def _final_norm(model: nn.Module) -> nn.Module:
    layers = decoder_layers(model)
    parent = next(module for module in model.modules() if layers in list(module.children()))
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    if not norms:
        raise BadConfig(f"{type(parent).__name__} has no norm after its layers")
    return norms[-1]


def _varied(candidates: list[Example]) -> list[Example]:
    """The strongest examples with different words at their peaks, then the strongest others."""
    words: set[str] = set()
    first: list[Example] = []
    others: list[Example] = []
    for example in candidates:
        peak = example.activations.index(max(example.activations))
        word = example.tokens[peak].strip().lower()
        (others if word in words else first).append(example)
        words.add(word)
    chosen = (first + others)[:EXAMPLES]
    return [example for example in candidates if example in chosen][:EXAMPLES]


def _window(values: Tensor, tokens: Tensor, texts: list[str]) -> Example:
    peak = int(values.argmax())
    span = slice(max(0, peak - BEFORE), peak + AFTER + 1)
    return Example(
        tuple(texts[token] for token in tokens[span].tolist()),
        tuple(float(f"{value:.2g}") for value in values[span].tolist()),
    )


def _named(values: Tensor, tokens: Tensor, texts: list[str]) -> tuple[tuple[str, float], ...]:
    return tuple(
        (texts[token], round(value, 2))
        for value, token in zip(values.tolist(), tokens.tolist(), strict=True)
    )
