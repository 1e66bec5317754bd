"""Features explained and simulated by a real language model in a real vLLM, started for them and gone after."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from trainer.errors import TrainerError
from trainer.model import load_model, load_tokenizer
from trainer.paper.config import InterpretabilitySettings, PaperConfig
from trainer.paper.interpretability import prompts
from trainer.paper.interpretability.experiment import experiment
from trainer.paper.interpretability.language_model import numbers
from trainer.paper.interpretability.local import serving
from trainer.paper.lab import Lab
from trainer.stop import Stop

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SERVE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "8")


@pytest.fixture(scope="module")
def found(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the experiment on the repository's own prose, with one feature."""
    folder = tmp_path_factory.mktemp("interpretability")
    for path in ROOT.glob("*.md"):
        (folder / f"{path.stem}.txt").write_text(path.read_text())
    settings = InterpretabilitySettings(
        dictionaries=(str(ROOT / "examples/dictionaries/smollm2-135m/resid_post.10"),),
        explainers=("llm", "token"),
        features=2,
        llm_features=1,
        fragments=400,
        stride=33,
        fragment_tokens=32,
        examples=8,
        llm=str(model_path),
        serve=SERVE,
    )
    config = PaperConfig(
        model=str(model_path),
        out=str(folder / "out"),
        corpus={str(folder / "*.txt"): 1.0},
        holdout_every=1,
        interpretability=settings,
    )

    experiment(Lab(config, Stop()))
    return folder / "out" / "interpretability"


def test_a_language_model_explains_and_simulates(found: Path) -> None:
    by = found / "smollm2-135m" / "resid_post.10"
    result = json.loads((by / "llm.json").read_text())["result"]
    (row,) = result["features"]

    assert "log-probabilities of the numbers from 0 to 9" in result["explainer"]
    assert row["explanation"]
    assert row["scores"]["top_and_random"] is not None
    assert 0 <= row["detection"]["auroc"] <= 1
    assert len(json.loads((by / "token.json").read_text())["result"]["features"]) == 2
    assert not [p for p in psutil.Process().children(recursive=True) if "vllm" in p.name().lower()]


def test_simulated_activations_are_those_of_transformers_log_probabilities(
    found: Path, model_path: Path
) -> None:
    (path,) = (found / "neuron-explainer").rglob("llm/10/*.jsonl")
    (scored,) = json.loads(path.read_text())["scored_explanations"]
    simulation = scored["scored_simulation"]["scored_sequence_simulations"][0]["simulation"]
    prompt = prompts.simulating(scored["explanation"], simulation["tokens"])

    expected = by_transformers(model_path, prompt, len(simulation["tokens"]))

    assert simulation["expected_activations"] == pytest.approx(expected, abs=2e-3)
    assert len(set(expected)) > 10
    for probabilities in simulation["distribution_probabilities"]:
        assert sum(probabilities) == pytest.approx(1.0)


def by_transformers(model_path: Path, prompt: str, count: int) -> list[float]:
    """What the 20 likeliest tokens at each of the last unknown activations make."""
    model: Any = load_model(str(model_path))
    tokenizer = load_tokenizer(str(model_path))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    texts = [tokenizer.decode([token]) for token in ids[0].tolist()]
    with torch.inference_mode():
        likely = model(input_ids=ids).logits[0].float().log_softmax(dim=-1)
    places = [place for place, text in enumerate(texts) if text == "unknown"][-count:]
    found = []
    for place in places:
        top = likely[place - 1].topk(20)
        named = {
            tokenizer.decode([token]): value
            for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        }
        values, probabilities = numbers(named, 9)
        found.append(sum(v * p for v, p in zip(values, probabilities, strict=True)))
    return found


def test_a_model_that_does_not_start_is_an_error_with_what_vllm_said(tmp_path: Path) -> None:
    with (
        pytest.raises(TrainerError, match=r"did not start the language model(.|\n)*nothing-here"),
        serving(str(tmp_path / "nothing-here"), (), tmp_path / "vllm.log", Stop()),
    ):
        pass
