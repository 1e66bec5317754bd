"""The commands on dictionaries: train one, evaluate one, label its features."""

import tomllib
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from steer_server.dictionary.card import Card, Model, Quality, SelfTest, config_digest
from steer_server.dictionary.features import Evidence
from steer_server.dictionary.files import CARD, StoredDictionary, check_model, load, save
from steer_server.dictionary.site import Site
from trainer import corpus, interpret
from trainer.config import TrainConfig, from_mapping
from trainer.errors import BadConfig
from trainer.evaluate import evaluate
from trainer.harvest import harvest
from trainer.model import load_model, load_tokenizer, revision, shape_of
from trainer.stop import Stop
from trainer.tokens import SPECIAL_TOKENS, pack
from trainer.train import train


def run(config: TrainConfig, runs: Path, stop: Stop) -> Card:
    """Harvest, train, evaluate, interpret, save; each stage goes on where it was broken off.

    Intermediate files lie in `runs`, under names that stand for the settings they depend on.
    """
    out = Path(config.out)
    if (out / CARD).exists():
        return _finished(config, out)
    torch.set_num_threads(config.threads)
    activations = harvest(config, runs / f"activations-{config.harvest_digest}", stop)
    dictionary = train(config, activations, runs / f"training-{config.digest_of_all}", stop)
    dictionary = dictionary.to(torch.float16).to(torch.float32)  # measure what is stored

    model, site = load_model(config.model), Site.parse(config.site)
    skip, max_norm = config.skip_positions, activations.max_norm
    quality = evaluate(model, site, dictionary, activations.heldout, skip, max_norm, stop)
    survey = interpret.survey(dictionary, activations, stop)
    tokenizer = load_tokenizer(config.model)
    evidence = interpret.evidence(survey, activations, model, tokenizer, stop)
    card = Card(
        name=out.name,
        model=Model(
            Path(config.model).name if Path(config.model).is_dir() else config.model,
            revision(config.model),
            config_digest(shape_of(config.model)),
        ),
        site=site,
        d_model=dictionary.d_model,
        n_features=dictionary.n_features,
        architecture="tied_relu",
        activation=dictionary.activation,
        input_scale=dictionary.input_scale,
        center_input=dictionary.center_input,
        dtype="float16",
        self_test=SelfTest((), (), (), ()),
        quality=quality,
        training={
            "config": asdict(config),
            "corpus": corpus.fingerprint(config.corpus),
            "tokens": activations.count,
            "special_tokens": SPECIAL_TOKENS,
            "separator": tokenizer.eos_token,
            "max_norm": max_norm,
            "code": {name: _version(name) for name in ("steer", "torch", "transformers")},
        },
    )
    return save(out, card, dictionary, survey.statistics(), evidence)


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
    check_model(stored.card, shape_of(config.model))
    torch.set_num_threads(config.threads)
    contexts = pack(config, load_tokenizer(config.model), stop, ["heldout"])
    return evaluate(
        load_model(config.model),
        stored.card.site,
        stored.dictionary,
        contexts["heldout"],
        config.skip_positions,
        stored.card.training["max_norm"],
        stop,
    )


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
    card = save(folder, stored.card, stored.dictionary, stored.statistics, entries)
    assert card.sha256 == stored.sha256
    return len(labels)


def _finished(config: TrainConfig, out: Path) -> Card:
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
    return from_mapping(stored.card.training["config"])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
