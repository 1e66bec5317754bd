"""The independent reference: transformers in float32 with a forward hook that edits and records x."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.edits import Edit, edit_delta

EditsAt = Callable[[int], Sequence[Edit]]
"""The edits that hold at an absolute position."""


class Completion(NamedTuple):
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    x: Tensor
    """The residual stream before any edit, [prompt + generated - 1, d_model]."""


class Reference:
    """Greedy generation, one token at a time."""

    def __init__(self, model: Path, layer: int, dictionary: Dictionary) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._layer = self.model.model.layers[layer]
        self._dictionary = dictionary

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    @torch.no_grad()
    def generate(
        self, prompt: Sequence[int], tokens: int, edits_at: EditsAt, most: float = math.inf
    ) -> Completion:
        """Rows are moved by `most` lengths of x at most."""
        with _hooked(self._layer, self._dictionary, edits_at, most) as seen:
            ids, logprobs, cache = [], [], None
            step = torch.tensor([list(prompt)])
            for _ in range(tokens):
                out = self.model(step, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                scores = out.logits[0, -1].log_softmax(dim=-1)
                token = int(scores.argmax())
                ids.append(token)
                logprobs.append(float(scores[token]))
                step = torch.tensor([[token]])
        return Completion(tuple(ids), tuple(logprobs), torch.cat(seen))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return self._tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def next_token(self, prompt: Sequence[int], edits_at: EditsAt) -> Tensor:
        """The log-probability of every token after the prompt."""
        with _hooked(self._layer, self._dictionary, edits_at):
            return self.model(torch.tensor([list(prompt)])).logits[0, -1].log_softmax(dim=-1)

    @torch.no_grad()
    def score(self, prompt: Sequence[int], edits_at: EditsAt) -> list[float]:
        """The log-probability of each prompt token but the first."""
        with _hooked(self._layer, self._dictionary, edits_at):
            scores = self.model(torch.tensor([list(prompt)])).logits[0, :-1].log_softmax(dim=-1)
        return scores.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()

    def also(
        self, layer: int, dictionary: Dictionary, edits_at: EditsAt
    ) -> AbstractContextManager[object]:
        """The next generation is edited at another layer, too."""
        return _hooked(self.model.model.layers[layer], dictionary, edits_at)


@contextmanager
def _hooked(
    layer: nn.Module, dictionary: Dictionary, edits_at: EditsAt, most: float = math.inf
) -> Iterator[list[Tensor]]:
    """Edits what the layer gives; yields its x of each pass."""
    seen: list[Tensor] = []
    position = 0

    def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
        nonlocal position
        x = output[0]
        seen.append(x.clone())
        delta = torch.zeros_like(x)
        for row in range(len(x)):
            edits = edits_at(position + row)
            if edits:
                delta[row] = edit_delta(dictionary, x[row : row + 1], edits)[0]
                delta[row] *= (most * x[row].norm() / delta[row].norm()).clamp(max=1.0)
        position += len(x)
        return output + delta

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
