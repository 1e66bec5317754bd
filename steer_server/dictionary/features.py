"""What is known of each feature: statistics of its activations, and the evidence for its label."""

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


class FeatureStatistics(NamedTuple):
    """Over the tokens the card names; a feature that never fired has zeros."""

    density: Float[Tensor, " n_features"]
    """Share of tokens with a non-zero activation."""
    mean: Float[Tensor, " n_features"]
    """Mean of the non-zero activations."""
    max: Float[Tensor, " n_features"]
    quantiles: Float[Tensor, "n_features levels"]
    """Of the non-zero activations, at `QUANTILES`."""

    @classmethod
    def zeros(cls, n_features: int) -> "FeatureStatistics":
        """For a dictionary nobody has measured yet."""
        one = torch.zeros(n_features)
        return cls(one, one.clone(), one.clone(), torch.zeros(n_features, len(QUANTILES)))


@dataclass(frozen=True)
class Example:
    """A stretch of text and the feature's activation on each of its tokens."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Evidence:
    """One line of `features.jsonl`."""

    feature: int
    label: str = ""
    examples: tuple[Example, ...] = ()
    """Strongest first."""
    logits_up: tuple[tuple[str, float], ...] = ()
    """Tokens whose logit the decoder direction raises most, through the final norm and the head."""
    logits_down: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> str:
        content = asdict(self)
        for example in content["examples"]:
            # Most activations are 0, and there are many: one character instead of three.
            example["activations"] = [value or 0 for value in example["activations"]]
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> "Evidence":
        content = json.loads(line)
        examples = tuple(
            Example(tuple(item["tokens"]), tuple(map(float, item["activations"])))
            for item in content.pop("examples")
        )
        up = tuple((token, value) for token, value in content.pop("logits_up"))
        down = tuple((token, value) for token, value in content.pop("logits_down"))
        return cls(examples=examples, logits_up=up, logits_down=down, **content)
