"""The commands on dictionaries: harvest for one, train one, evaluate one, label its features."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from steer_server.dictionary.card import Card, Model, Quality, config_digest
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import Evidence
from steer_server.dictionary.files import CARD, StoredDictionary, check_model, load, save
from steer_server.dictionary.site import Site
from trainer import corpus, interpret
from trainer.baselines import Directions, fit, names
from trainer.buffer import Buffer
from trainer.config import BASELINES, PASS_FIELDS, TrainConfig, digest, from_mapping
from trainer.errors import BadConfig
from trainer.evaluate import evaluate, evaluate_together
from trainer.harvest import Activations, Reader, harvest
from trainer.model import load_model, load_tokenizer, revision, shape_of
from trainer.probe import Probe, probe
from trainer.progress import NOBODY, Watchers, curves
from trainer.ranks import ALONE, Ranks
from trainer.source import Source
from trainer.stack import stacks
from trainer.stop import Stop
from trainer.tokens import SPECIAL_TOKENS, pack
from trainer.train import METRICS, train

_AT_ONCE = 4
"""Dictionaries that are finished together: the model runs twice without any for all of them, and a stop costs what was
done for them."""


def run(
    configs: Sequence[TrainConfig],
    runs: Path,
    stop: Stop,
    ranks: Ranks = ALONE,
    watchers: Watchers = NOBODY,
) -> list[Card]:
    """Harvest all sites in one pass, train a site's dictionaries in one pass, then interpret, evaluate and save each.

    With a buffer in the place of a harvest, the dictionaries of all sites train in one pass of the model.

    Each stage goes on where it was broken off. Intermediate files lie in `runs`, under names that stand for the
    settings they depend on. Dictionaries that are there already are left alone. Of several ranks, each returns the
    cards of what it saves.
    """
    first = configs[0]
    _check_pass(configs)
    mine = ranks.saves(configs)
    if all((Path(config.out) / CARD).exists() for config in configs):
        return [_finished(config) for config in mine]
    torch.set_num_threads(first.threads)
    sources = _sources(configs, runs, stop, ranks)
    if ranks.parallel == "members":
        configs, ranks = mine, ALONE
    made: dict[str, Dictionary] = {}
    lines: dict[str, str] = {}
    for source in sources:
        here = [c for c in _of(source, configs) if c.architecture not in BASELINES]
        if here:
            folder = runs / f"training-{digest(here)}"
            trained = train(here, source, folder, stop, ranks=ranks, watchers=watchers)
            made |= zip([c.out for c in here], trained, strict=ranks.first)
            lines |= _curves(here, folder)
    load_once = cache(lambda: load_model(first.model, first.weights, first.data_seed))
    for source in sources:
        left = [c for c in _of(source, mine) if not (Path(c.out) / CARD).exists()]
        # Where activations cost a run of the model, one run is for all.
        at_once = max(1, len(left)) if first.storage == "buffer" else _AT_ONCE
        known: dict[str, Directions] = {}
        for start in range(0, len(left), at_once):
            some = [
                (c, made.get(c.out) or fit(c, source, stop, known))
                for c in left[start : start + at_once]
            ]
            _finish(some, source, load_once, lines, stop)
    return [_finished(config) for config in mine]


def _sources(configs: Sequence[TrainConfig], runs: Path, stop: Stop, ranks: Ranks) -> list[Source]:
    """The activations of all sites, together or one by one."""
    first, folder = configs[0], harvest_folder(configs[0], runs)
    if first.storage == "shards":
        return list(harvest(first, _sites(configs), folder, stop, ranks=ranks).values())
    if ranks.size > 1:
        raise BadConfig('storage = "buffer" is for one process; several need storage = "shards"')
    return [Buffer(first, Reader(first, _sites(configs), folder, stop), folder, stop)]


def _of(source: Source, configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    return [config for config in configs if Site.parse(config.site) in source.sites]


def harvest_only(
    configs: Sequence[TrainConfig], runs: Path, stop: Stop, on_end: Callable[[int, float], None]
) -> dict[Site, Activations]:
    """The harvest that `run` begins with, for trainings to come; `on_end` as of `harvest`."""
    first = configs[0]
    _check_pass(configs)
    if first.storage != "shards":
        raise BadConfig(
            f"storage is {first.storage!r}, which leaves no activations on disk; train at once, or harvest with "
            "--set storage=shards"
        )
    torch.set_num_threads(first.threads)
    return harvest(first, _sites(configs), harvest_folder(first, runs), stop, on_end)


def harvest_folder(config: TrainConfig, runs: Path) -> Path:
    """Where the activations lie that the configuration asks for."""
    return runs / f"activations-{config.harvest_digest}"


def _sites(configs: Sequence[TrainConfig]) -> list[Site]:
    return sorted({Site.parse(config.site) for config in configs})


def _check_pass(configs: Sequence[TrainConfig]) -> None:
    first = configs[0]
    if len({config.out for config in configs}) < len(configs):
        raise BadConfig("each dictionary of a pass needs an `out` of its own")
    if any(c.digest(PASS_FIELDS) != first.digest(PASS_FIELDS) for c in configs):
        raise BadConfig(
            "dictionaries of one pass have their activations, batch and epochs in common"
        )


def _curves(configs: Sequence[TrainConfig], folder: Path) -> dict[str, str]:
    """What the training in `folder` wrote of each, by `out`."""
    in_order = [config.out for members in stacks(configs) for config in members]
    return dict(zip(in_order, curves(folder / METRICS, len(in_order)), strict=True))


def _finish(
    trained: Sequence[tuple[TrainConfig, Dictionary]],
    source: Source,
    load_once: Callable[[], nn.Module],
    lines: Mapping[str, str],
    stop: Stop,
) -> None:
    """Interprets, evaluates and saves trained dictionaries; `lines` are their training curves, by `out`."""
    first = trained[0][0]
    tokenizer = load_tokenizer(first.model)
    texts = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
    # Measure what is stored.
    dictionaries = [
        (Site.parse(config.site), dictionary.to(torch.float16).to(torch.float32))
        for config, dictionary in trained
    ]
    surveys = interpret.surveys(dictionaries, source, stop)
    at = [(site, survey) for (site, _), survey in zip(dictionaries, surveys, strict=True)]
    examples = interpret.examples(at, source, texts, stop)
    source.close()
    model = load_once()
    qualities = _qualities(model, dictionaries, source, first.skip_positions, stop)
    for (config, _), (site, dictionary), quality, survey, shown in zip(
        trained, dictionaries, qualities, surveys, examples, strict=True
    ):
        evidence = interpret.evidence(site, dictionary, shown, source.train, model, texts, stop)
        evidence = _labelled(evidence, names(config, source, stop))
        card = _card(config, dictionary, quality, survey, source.max_norms[site], tokenizer)
        curve = lines.get(config.out, "")
        save(Path(config.out), card, dictionary, survey.statistics(), evidence, curve)


def _qualities(
    model: nn.Module,
    dictionaries: Sequence[tuple[Site, Dictionary]],
    source: Source,
    skip_positions: int,
    stop: Stop,
) -> list[Quality]:
    """In order; those of a site are evaluated together."""
    numbers: dict[Site, list[int]] = {}
    for number, (site, _) in enumerate(dictionaries):
        numbers.setdefault(site, []).append(number)
    found: dict[int, Quality] = {}
    for site, own in numbers.items():
        theirs = [dictionaries[number][1] for number in own]
        bound = source.max_norms[site]
        qualities = evaluate_together(
            model, site, theirs, source.heldout, skip_positions, bound, stop
        )
        found |= zip(own, qualities, strict=True)
    return [found[number] for number in range(len(dictionaries))]


def _card(
    config: TrainConfig,
    dictionary: Dictionary,
    quality: Quality,
    survey: interpret.Survey,
    max_norm: float,
    tokenizer: PreTrainedTokenizerBase,
) -> Card:
    return Card.of(
        dictionary,
        name=Path(config.out).name,
        model=Model(
            Path(config.model).name if Path(config.model).is_dir() else config.model,
            revision(config.model) if config.weights == "trained" else f"seed {config.data_seed}",
            config_digest(shape_of(config.model)),
            config.weights,
        ),
        site=Site.parse(config.site),
        architecture=config.architecture,
        dtype="float16",
        quality=quality,
        training={
            "config": asdict(config) | {"prefixes": list(config.prefixes)},
            "corpus": corpus.fingerprint(config.corpus),
            "tokens": survey.tokens,
            "special_tokens": SPECIAL_TOKENS,
            "separator": tokenizer.eos_token,
            "max_norm": max_norm,
            "code": {name: _version(name) for name in ("steer", "torch", "transformers")},
        },
    )


def _labelled(evidence: Sequence[Evidence], names: Sequence[str]) -> list[Evidence]:
    return [replace(e, label=names[e.feature]) if names else e for e in evidence]


def evaluate_again(
    folder: Path, model: str | None, corpora: list[str], eval_tokens: int | None, stop: Stop
) -> Quality:
    """Quality of a finished dictionary, on its own held-out documents unless told otherwise.

    All documents of corpora it was not trained on count as held out.
    """
    stored = load(folder)
    config = _config_of(stored)
    changes: dict[str, Any] = {"model": model} if model else {}
    if eval_tokens:
        changes["eval_tokens"] = eval_tokens
    if corpora:
        changes["corpus"] = dict.fromkeys(corpora, 1.0)
        if not set(corpora) & set(config.corpus):
            changes["holdout_every"] = 1
    config = replace(config, **changes)
    check_model(stored.card, shape_of(config.model), config.weights)
    torch.set_num_threads(config.threads)
    contexts = pack(config, load_tokenizer(config.model), stop, ["heldout"])
    return evaluate(
        load_model(config.model, config.weights, config.data_seed),
        stored.card.site,
        stored.dictionary,
        contexts["heldout"],
        config.skip_positions,
        stored.card.training["max_norm"],
        stop,
    )


def probe_again(
    folders: Sequence[Path],
    corpora: Sequence[str],
    tokens: tuple[int, int],
    tags: Sequence[str],
    ks: Sequence[int],
    stop: Stop,
) -> tuple[list[Probe], TrainConfig]:
    """k-sparse probes of finished dictionaries, and on what; `tokens` are for training and for the test.

    Without corpora the first dictionary's own, as far as it has tags; its contexts are used for all.
    """
    stored = [load(folder) for folder in folders]
    config = _config_of(stored[0])
    chosen = dict.fromkeys(corpora, 1.0) or {
        spec: share for spec, share in config.corpus.items() if next(corpus.tagged([spec]), None)
    }
    if not chosen:
        raise BadConfig(
            f"the corpora of {folders[0]} have no tags; name one with --corpus, such as corpora/brown.jsonl"
        )
    config = replace(config, corpus=chosen, tokens=tokens[0], eval_tokens=tokens[1])
    for entry in stored:
        check_model(entry.card, shape_of(config.model), config.weights)
    torch.set_num_threads(config.threads)
    return probe(stored, config, tags, ks, stop), config


def label(folder: Path, path: Path) -> int:
    """Merges the labels of a TOML file into the dictionary's evidence; how many it set.

    The file names the dictionary by the sha256 of its weights, which do not change.
    """
    stored = load(folder)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        weights: str = content["weights_sha256"]
        labels = {int(feature): str(text) for feature, text in content["labels"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadConfig(
            f"{path} cannot be read ({error!r}); it needs weights_sha256 and a table [labels] of "
            'feature = "text"'
        ) from error
    if weights != stored.sha256:
        raise BadConfig(
            f"{path} is about a dictionary with weights {weights}, {folder} has {stored.sha256}: "
            "a feature's number means nothing in another dictionary"
        )
    unknown = [feature for feature in labels if not 0 <= feature < stored.card.n_features]
    if unknown:
        raise BadConfig(f"{path} labels {unknown}; features are 0..{stored.card.n_features - 1}")
    evidence = dict(stored.evidence)
    for feature, text in labels.items():
        evidence[feature] = replace(evidence.get(feature, Evidence(feature)), label=text)
    entries = [evidence[feature] for feature in sorted(evidence)]
    parts = stored.card, stored.dictionary, stored.statistics, entries, stored.curve
    card = save(folder, *parts)
    assert card.sha256 == stored.sha256
    return len(labels)


def _finished(config: TrainConfig) -> Card:
    out = Path(config.out)
    stored = load(out)
    if _config_of(stored) != config:
        raise BadConfig(
            f"{out} holds a dictionary made with another configuration; "
            "remove it, or choose another place with --set out=FOLDER"
        )
    return stored.card


def _config_of(stored: StoredDictionary) -> TrainConfig:
    if "config" not in stored.card.training:
        raise BadConfig(f"the card of {stored.card.name!r} says nothing of how it was trained")
    return from_mapping({"architecture": stored.card.architecture} | stored.card.training["config"])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
