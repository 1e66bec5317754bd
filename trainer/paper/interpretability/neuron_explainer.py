"""OpenAI's records of neurons and of scored explanations, as JSON that their tools read.

The names are those of the dataclasses in github.com/openai/automated-interpretability, neuron-explainer, which are read
by `neuron_explainer.fast_dataclasses.loads`; a folder of NeuronRecords has LAYER/FEATURE.json, one of NeuronSimulationResults
LAYER/FEATURE.jsonl.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.files import whole_file
from trainer.paper.interpretability.explainers import Simulation
from trainer.paper.interpretability.records import Record, Records
from trainer.paper.interpretability.sample import Moments
from trainer.paper.interpretability.scores import Score, score


def neuron_record(layer: int, feature: int, records: Records, moments: Moments) -> dict[str, Any]:
    """A NeuronRecord."""
    return _named(
        "NeuronRecord",
        neuron_id=_neuron_id(layer, feature),
        random_sample=[activation_record(record) for record in records.random],
        random_sample_by_quantile=None,
        quantile_boundaries=None,
        mean=moments.mean,
        variance=moments.variance,
        skewness=moments.skewness,
        kurtosis=moments.kurtosis,
        most_positive_activation_records=[activation_record(record) for record in records.top],
    )


def activation_record(record: Record) -> dict[str, Any]:
    """An ActivationRecord."""
    return _named(
        "ActivationRecord", tokens=list(record.tokens), activations=list(record.activations)
    )


def simulation_results(
    layer: int,
    feature: int,
    explanation: str,
    records: Sequence[Record],
    simulations: Sequence[Simulation],
) -> dict[str, Any]:
    """NeuronSimulationResults of one explanation."""
    scored = _named("ScoredExplanation", explanation=explanation) | {
        "scored_simulation": scored_simulation(records, simulations)
    }
    return _named(
        "NeuronSimulationResults",
        neuron_id=_neuron_id(layer, feature),
        scored_explanations=[scored],
    )


def scored_simulation(
    records: Sequence[Record], simulations: Sequence[Simulation]
) -> dict[str, Any]:
    """A ScoredSimulation, with the scores of each sequence and of all together."""
    sequences = []
    for record, simulation in zip(records, simulations, strict=True):
        own = score([record.activations], [simulation.expected])
        sequences.append(
            _named(
                "ScoredSequenceSimulation",
                simulation=_sequence_simulation(record.tokens, simulation),
                true_activations=list(record.activations),
                **_scores(own),
            )
        )
    pooled = score([r.activations for r in records], [s.expected for s in simulations])
    return _named("ScoredSimulation", scored_sequence_simulations=sequences, **_scores(pooled))


def write(path: Path, content: dict[str, Any]) -> None:
    """On a single line, as their readers want it."""
    with whole_file(path) as fresh:
        fresh.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _sequence_simulation(tokens: Sequence[str], simulation: Simulation) -> dict[str, Any]:
    return _named(
        "SequenceSimulation",
        tokens=list(tokens),
        expected_activations=simulation.expected,
        activation_scale="simulated_normalized_activations",
        distribution_values=simulation.values,
        distribution_probabilities=simulation.probabilities,
        uncalibrated_simulation=None,
    )


def _scores(found: Score) -> dict[str, float | None]:
    return {
        "ev_correlation_score": found.correlation,
        "rsquared_score": found.r_squared,
        "absolute_dev_explained_score": found.absolute_dev_explained,
    }


def _neuron_id(layer: int, feature: int) -> dict[str, Any]:
    return _named("NeuronId", layer_index=layer, neuron_index=feature)


def _named(name: str, **content: Any) -> dict[str, Any]:
    return content | {"dataclass_name": name}
