"""The commands on dictionaries: train one, evaluate one, label its features."""

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, replace
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
from trainer.baselines import fit, names
from trainer.config import BASELINES, PASS_FIELDS, TrainConfig, digest, from_mapping
from trainer.errors import BadConfig
from trainer.evaluate import evaluate
from trainer.harvest import Activations, harvest
from trainer.model import load_model, load_tokenizer, revision, shape_of
from trainer.probe import Probe, probe
from trainer.progress import NOBODY, Watchers, curves
from trainer.stack import stacks
from trainer.stop import Stop
from trainer.tokens import SPECIAL_TOKENS, pack
from trainer.train import METRICS, train


def run(
    configs: Sequence[TrainConfig], runs: Path, stop: Stop, watchers: Watchers = NOBODY
) -> list[Card]:
    """Harvest all sites in one pass, train a site's dictionaries in one pass, then evaluate, interpret and save each.

    Each stage goes on where it was broken off. Intermediate files lie in `runs`, under names that stand for the
    settings they depend on. Dictionaries that are there already are left alone.
    """
    first = configs[0]
    if len({config.out for config in configs}) < len(configs):
        raise BadConfig("each dictionary of a pass needs an `out` of its own")
    if any(c.digest(PASS_FIELDS) != first.digest(PASS_FIELDS) for c in configs):
        raise BadConfig(
            "dictionaries of one pass have their activations, batch and epochs in common"
        )
    if all((Path(config.out) / CARD).exists() for config in configs):
        return [_finished(config) for config in configs]
    torch.set_num_threads(first.threads)
    sites = sorted({Site.parse(config.site) for config in configs})
    harvested = harvest(first, sites, runs / f"activations-{first.harvest_digest}", stop)
    made: dict[str, Dictionary] = {}
    lines: dict[str, str] = {}
    for site, activations in harvested.items():
        here = [config for config in configs if config.site == str(site)]
        folder = runs / f"training-{digest(here)}"
        made |= zip(
            [c.out for c in here], _make(here, activations, folder, stop, watchers), strict=True
        )
        lines |= _curves(here, folder)
    model = load_model(first.model, first.weights, first.data_seed)
    tokenizer = load_tokenizer(first.model)
    return [
        _finished(config)
        if (Path(config.out) / CARD).exists()
        else _finish(
            config,
            made[config.out],
            harvested[Site.parse(config.site)],
            model,
            tokenizer,
            stop,
            lines.get(config.out, ""),
        )
        for config in configs
    ]


def _make(
    configs: Sequence[TrainConfig],
    activations: Activations,
    folder: Path,
    stop: Stop,
    watchers: Watchers,
) -> list[Dictionary]:
    """The dictionaries of one site: baselines are fitted, all others trained together."""
    trained = [config for config in configs if config.architecture not in BASELINES]
    made = iter(train(trained, activations, folder, stop, watchers=watchers) if trained else ())
    return [
        fit(config, activations, stop) if config.architecture in BASELINES else next(made)
        for config in configs
    ]


def _curves(configs: Sequence[TrainConfig], folder: Path) -> dict[str, str]:
    """What the training in `folder` wrote of each, by `out`."""
    trained = [config for config in configs if config.architecture not in BASELINES]
    in_order = [config.out for members in stacks(trained) for config in members]
    return dict(zip(in_order, curves(folder / METRICS, len(in_order)), strict=True))


def _finish(
    config: TrainConfig,
    dictionary: Dictionary,
    activations: Activations,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    stop: Stop,
    curve: str,
) -> Card:
    """Evaluates, interprets and saves one trained dictionary."""
    out, site = Path(config.out), Site.parse(config.site)
    dictionary = dictionary.to(torch.float16).to(torch.float32)  # measure what is stored
    skip, max_norm = config.skip_positions, activations.max_norm
    quality = evaluate(model, site, dictionary, activations.heldout, skip, max_norm, stop)
    survey = interpret.survey(dictionary, activations, stop)
    evidence = interpret.evidence(survey, activations, model, tokenizer, stop)
    evidence = _labelled(evidence, names(config, activations, stop))
    card = Card.of(
        dictionary,
        name=out.name,
        model=Model(
            Path(config.model).name if Path(config.model).is_dir() else config.model,
            revision(config.model) if config.weights == "trained" else f"seed {config.data_seed}",
            config_digest(shape_of(config.model)),
            config.weights,
        ),
        site=site,
        architecture=config.architecture,
        dtype="float16",
        quality=quality,
        training={
            "config": asdict(config) | {"prefixes": list(config.prefixes)},
            "corpus": corpus.fingerprint(config.corpus),
            "tokens": activations.count,
            "special_tokens": SPECIAL_TOKENS,
            "separator": tokenizer.eos_token,
            "max_norm": max_norm,
            "code": {name: _version(name) for name in ("steer", "torch", "transformers")},
        },
    )
    return save(out, card, dictionary, survey.statistics(), evidence, curve)


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
