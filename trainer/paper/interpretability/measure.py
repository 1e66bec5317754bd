"""Scores of all dictionaries by all explainers, each part of them kept as soon as it is there.

In the configuration's folder `out`, with a dictionary named by the last two parts of its own:

    interpretability/DICTIONARY/EXPLAINER.json            under "result" what it is of, and of each feature its explanation,
                                                          scores, detection, fuzzing and moments
    interpretability/neuron-explainer/DICTIONARY/         the records and simulations behind them, for OpenAI's tools:
        neurons/LAYER/FEATURE.json, EXPLAINER/LAYER/FEATURE.jsonl
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from steer_server.dictionary.files import StoredDictionary
from trainer.config import BASELINES
from trainer.corpus import fingerprint
from trainer.errors import BadConfig, BadCorpus
from trainer.paper.interpretability import neuron_explainer
from trainer.paper.interpretability.classify import detection, fuzzing
from trainer.paper.interpretability.explainers import RULES, Explainer, Explanation
from trainer.paper.interpretability.fragments import Activations, Fragments, cut
from trainer.paper.interpretability.records import Records, generator, least_firing
from trainer.paper.interpretability.sample import Moments, Sample, draw
from trainer.paper.interpretability.scores import score
from trainer.paper.lab import Lab, training
from trainer.paper.results import key

NAME = "interpretability"
LLM = "llm"
_TEXT = ("fragments", "fragment_tokens", "stride")
_PROTOCOL = ("features", "examples")
_MODELS = ("llm", "llm_url", "simulator", "simulator_url", "serve")


class Subject(NamedTuple):
    """A dictionary that is scored."""

    label: str
    """The last two parts of its folder."""
    stored: StoredDictionary

    @property
    def untrained_model(self) -> bool:
        return self.stored.card.model.weights == "random"

    @property
    def baseline(self) -> bool:
        return self.stored.card.architecture in BASELINES

    @property
    def model(self) -> tuple[str, int]:
        """Weights and, of random ones, their seed."""
        config = training(self.stored)
        return config.weights, config.data_seed if config.weights == "random" else 0


def subjects(lab: Lab) -> list[Subject]:
    """The dictionaries of the configuration, in its order."""
    folders = lab.config.interpretability.dictionaries
    if not folders:
        raise BadConfig("interpretability.dictionaries is empty; name folders of dictionaries")
    labels = ["/".join(Path(folder).parts[-2:]) for folder in folders]
    if len(set(labels)) < len(labels):
        raise BadConfig(f"interpretability.dictionaries have the same last two parts: {labels}")
    return [
        Subject(label, lab.dictionary(folder))
        for label, folder in zip(labels, folders, strict=True)
    ]


class Measurement:
    """Of one configuration."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.settings = lab.config.interpretability
        self.subjects = subjects(lab)
        self._results = lab.results(NAME)
        self._open = ExitStack()
        self._samples: dict[str, Sample] = {}
        self._collected: dict[tuple[str, int], Activations] = {}

    def run(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """By label of the dictionary and name of the explainer: its features' scores."""
        found = {}
        with self._open:
            for subject in self.subjects:
                for explainer in self.settings.explainers:
                    found[subject.label, explainer] = self._results.get(
                        f"{subject.label}/{explainer}",
                        self._key(subject, explainer),
                        lambda subject=subject, explainer=explainer: self._score(
                            subject, explainer
                        ),
                    )
                self._samples.clear()
        for activations in self._collected.values():
            activations.remove()
        return found

    @cached_property
    def fragments(self) -> Fragments:
        """For all dictionaries the same."""
        chosen = self.settings
        return cut(self.lab, chosen.fragments, chosen.fragment_tokens, chosen.stride, self._lead)

    @property
    def _lead(self) -> int:
        return max(training(subject.stored).skip_positions for subject in self.subjects)

    def _key(self, subject: Subject, explainer: str) -> dict[str, Any]:
        config, chosen = self.lab.config, asdict(self.settings)
        names = (*_TEXT, *_PROTOCOL)
        if explainer == LLM:
            names += (*_MODELS, "llm_features")
        return {
            "dictionary": subject.stored.sha256,
            "explainer": explainer,
            "model": config.model,
            "corpus": dict(config.corpus),
            "files": fingerprint(config.corpus),
            "holdout_every": config.holdout_every,
            "seed": config.seed,
            "lead": self._lead,
            **{name: chosen[name] for name in names},
        }

    def _score(self, subject: Subject, explainer: str) -> dict[str, Any]:
        sample = self._sample(subject)
        judge = self._explainer(explainer)
        count = len(sample.features)
        if explainer == LLM and self.settings.llm_features:
            count = min(count, self.settings.llm_features)
        rows = []
        for number in tqdm(range(count), desc=f"{subject.label} by {explainer}", unit=" features"):
            self.lab.stop.check("scores of earlier dictionaries, and by llm of features, are there")
            rows.append(self._feature_kept(subject, sample, number, judge))
        card = subject.stored.card
        return {
            "dictionary": str(subject.stored.folder),
            "site": str(card.site),
            "architecture": card.architecture,
            "weights": card.model.weights,
            "n_features": card.n_features,
            "eligible": sample.eligible,
            "fragments": len(self.fragments),
            "thrown": self.fragments.thrown,
            "explainer": judge.about,
            "features": rows,
        }

    def _feature_kept(
        self, subject: Subject, sample: Sample, number: int, judge: Explainer
    ) -> dict[str, Any]:
        """A language model takes so long that each feature is a part of its own."""
        if judge.name != LLM:
            return self._feature(subject, sample, number, judge)
        feature = sample.features[number]
        return self._results.get(
            f"{subject.label}/{LLM}-features/{feature}",
            self._key(subject, LLM) | {"feature": feature},
            lambda: self._feature(subject, sample, number, judge),
        )

    def _feature(
        self, subject: Subject, sample: Sample, number: int, judge: Explainer
    ) -> dict[str, Any]:
        feature, layer = sample.features[number], subject.stored.card.site.layer
        seed = self.lab.config.seed
        records = sample.records(number, self.fragments, self.settings.examples, seed)
        explanation = judge.explain(records.train, records.max_train)
        row, results = scored(layer, feature, explanation, records, seed)
        neuron = neuron_explainer.neuron_record(layer, feature, records, sample.moments[number])
        folder = self._results.folder / "neuron-explainer" / subject.label
        neuron_explainer.write(folder / "neurons" / f"{layer}/{feature}.json", neuron)
        neuron_explainer.write(folder / judge.name / f"{layer}/{feature}.jsonl", results)
        return row | {"moments": _rounded(sample.moments[number])}

    def _sample(self, subject: Subject) -> Sample:
        if subject.label not in self._samples:
            chosen = self.settings
            found = draw(
                subject.stored,
                self._activations(subject.model),
                chosen.features,
                chosen.examples,
                self.lab.config.seed,
                self.lab.stop,
            )
            if not found.features:
                raise BadCorpus(
                    f"no feature of {subject.label} is active in {least_firing(chosen.examples)} of "
                    f"{len(self.fragments)} fragments; more text, a smaller `stride` or fewer `examples` may help"
                )
            self._samples[subject.label] = found
        return self._samples[subject.label]

    def _activations(self, model: tuple[str, int]) -> Activations:
        """Of all sites of the dictionaries of one model, in one pass."""
        if model not in self._collected:
            own = [subject for subject in self.subjects if subject.model == model]
            sites = sorted({subject.stored.card.site for subject in own}, key=str)
            settings = {
                "tokens": self.fragments.sha256,
                "model": [self.lab.config.model, *model],
                "sites": [str(site) for site in sites],
                "lead": self._lead,
            }
            folder = self._results.folder / f"activations-{key(settings)}"
            found = Activations(folder, self.fragments)
            name = f"{model[0]} model at {', '.join(map(str, sites))}"
            found.collect(self.lab, self.lab.model_of(own[0].stored), sites, name)
            self._collected[model] = found
        return self._collected[model]

    def _explainer(self, name: str) -> Explainer:
        return self._language_model if name == LLM else RULES[name]

    @cached_property
    def _language_model(self) -> Explainer:
        """Served here until the run ends, if it has no URL."""
        from trainer.paper.interpretability.language_model import Endpoint, LanguageModel
        from trainer.paper.interpretability.local import serving

        chosen = self.settings
        url = chosen.llm_url or self._open.enter_context(
            serving(chosen.llm, chosen.serve, self._results.folder / "vllm.log", self.lab.stop)
        )
        explainer = Endpoint(url, chosen.llm)
        if not chosen.simulator:
            return LanguageModel(explainer, explainer)
        return LanguageModel(explainer, Endpoint(chosen.simulator_url, chosen.simulator))


def scored(
    layer: int, feature: int, explanation: Explanation, records: Records, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A feature's scores, and the same in OpenAI's format with the simulations they come from."""
    groups = (records.scored_top, records.scored_random, records.fresh, records.any)
    simulations = iter(explanation.simulate([r.tokens for group in groups for r in group]))
    pairs = [[(record, next(simulations)) for record in group] for group in groups]
    top, random, fresh, any_ = pairs
    kinds = {
        "top_and_random": top + random,
        "top": top,
        "random": random,
        "top_and_fresh": top + fresh,
        "top_and_any": top + any_,
    }
    found = {
        kind: score([r.activations for r, _ in own], [s.expected for _, s in own])
        for kind, own in kinds.items()
    }
    row = {
        "feature": feature,
        "explanation": explanation.text,
        "scores": {kind: own.correlation for kind, own in found.items()},
        "r_squared": found["top_and_random"].r_squared,
        "absolute_dev_explained": found["top_and_random"].absolute_dev_explained,
        "detection": detection(explanation, records)._asdict(),
        "fuzzing": fuzzing(explanation, records, generator(seed, feature))._asdict(),
    }
    paper = top + random
    results = neuron_explainer.simulation_results(
        layer, feature, explanation.text, [r for r, _ in paper], [s for _, s in paper]
    )
    return row, results


def column(result: Mapping[str, Any], *names: str) -> Iterator[float | None]:
    """One number of every feature of a result."""
    for row in result["features"]:
        value: Any = row
        for name in names:
            value = value[name]
        yield value


def _rounded(moments: Moments) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in moments._asdict().items()}
