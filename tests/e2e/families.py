"""Small random models of many families, and the same edit in transformers and in vLLM's worker."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.v1.worker.cpu_worker import CPUWorker

from steer_server.dictionary.site import Site
from steer_server.vllm_plugin import layers
from steer_server.vllm_plugin.eager import EagerModel

N_LAYERS = 3
D_MODEL = 64
VOCABULARY = 512

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    # Far from flat, so that the likeliest token is not a matter of rounding.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 1}
_HEADS = _GROUPED | {"head_dim": 32}
_GEMMA = _HEADS | {"query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": D_MODEL,
    "n_layer": N_LAYERS,
    "n_head": 2,
    "n_positions": 128,
    "initializer_range": 0.2,
}


class Family(NamedTuple):
    """A transformers config, and where its model has what."""

    config: type[transformers.PreTrainedConfig]
    options: dict[str, Any]
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"

    def save(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config(**self.options))
        for weight in model.parameters():
            # Norms and biases are ones and zeros at birth, which would hide a wrong place.
            if weight.ndim == 1:
                weight.data += 0.2 * torch.randn_like(weight)
        model.save_pretrained(folder)


FAMILIES = {
    "llama": Family(transformers.LlamaConfig, _SHAPE | _GROUPED),
    "mistral": Family(transformers.MistralConfig, _SHAPE | _HEADS | {"sliding_window": None}),
    "qwen2": Family(transformers.Qwen2Config, _SHAPE | _GROUPED),
    "qwen3": Family(transformers.Qwen3Config, _SHAPE | _HEADS),
    "gemma2": Family(transformers.Gemma2Config, _SHAPE | _GEMMA),
    "gemma3": Family(transformers.Gemma3TextConfig, _SHAPE | _GEMMA),
    "gpt2": Family(transformers.GPT2Config, _GPT2, "transformer.h", "attn"),
    "gpt_neox": Family(transformers.GPTNeoXConfig, _SHAPE, "gpt_neox.layers", "attention"),
    "phi": Family(transformers.PhiConfig, _SHAPE),
    "phi3": Family(transformers.Phi3Config, _SHAPE | _GROUPED),
    "olmo": Family(transformers.OlmoConfig, _SHAPE | _GROUPED),
    "olmo2": Family(transformers.Olmo2Config, _SHAPE | _GROUPED),
    "cohere": Family(
        transformers.CohereConfig,
        _SHAPE | _GROUPED | {"logit_scale": 1.0, "tie_word_embeddings": True},
    ),
    "granite": Family(transformers.GraniteConfig, _SHAPE | _GROUPED | {"residual_multiplier": 0.5}),
    "stablelm": Family(transformers.StableLmConfig, _SHAPE | _GROUPED),
    "mixtral": Family(transformers.MixtralConfig, _SHAPE | _GROUPED | {"num_local_experts": 4}),
    "olmoe": Family(transformers.OlmoeConfig, _SHAPE | _GROUPED | _EXPERTS),
    "qwen2_moe": Family(
        transformers.Qwen2MoeConfig,
        _SHAPE | _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": Family(transformers.Qwen3MoeConfig, _SHAPE | _HEADS | _EXPERTS),
}

SITES = tuple(
    Site(stream, layer)
    for layer in (1, N_LAYERS - 1)
    for stream in ("resid_post", "mlp_out", "attn_out")
)


class Completion(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]
    x: Tensor
    """[prompt + generated - 1, d_model], before the edit."""


class Reference:
    """A family's model in transformers."""

    def __init__(self, folder: Path, family: Family) -> None:
        # Only transformers' eager attention caps Gemma's scores.
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._family = family

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], tokens: int, site: Site, d: Tensor) -> Completion:
        """Greedy, with `d` added at the site from position 1 on, everything computed anew for each token."""
        ids, logprobs, x = list(prompt), [], torch.empty(0)

        def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
            nonlocal x
            hidden = output if isinstance(output, Tensor) else output[0]
            x = hidden[0].clone()
            edited = hidden.clone()
            edited[:, 1:] += d
            return edited if isinstance(output, Tensor) else (edited, *output[1:])

        handle = self._module(site).register_forward_hook(hook)
        try:
            for _ in range(tokens):
                scores = self._model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                scores = scores.float().log_softmax(dim=-1)
                ids.append(int(scores.argmax()))
                logprobs.append(float(scores.max()))
        finally:
            handle.remove()
        return Completion(ids[len(prompt) :], logprobs, x)

    def _module(self, site: Site) -> nn.Module:
        layer = attrgetter(self._family.layers)(self._model)[site.layer]
        names = {"attn_out": self._family.attention, "mlp_out": self._family.mlp}
        return attrgetter(names[site.stream])(layer) if site.stream in names else layer


@dataclass
class Tap:
    """What the worker's sites do: adds `d` at one of them from position 1 on, and keeps its x."""

    attached: list[Site] = field(default_factory=list)
    number: int = -1
    d: Tensor = field(default_factory=lambda: torch.empty(0))
    x: list[Tensor] = field(default_factory=list)

    def __call__(self, hidden: Tensor, residual: Tensor | None, number: int) -> None:
        if number != self.number:
            return
        first = 0 if self.x else 1
        self.x.append(hidden.clone() if residual is None else hidden + residual)
        hidden[first:] += self.d

    @contextmanager
    def at(self, number: int, d: Tensor) -> Iterator[None]:
        self.number, self.d, self.x = number, d, []
        yield
        self.number = -1


@torch.library.custom_op("steer_families::tap", mutates_args=["hidden"])
def tap(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    """The worker's tap, opaque to torch.compile."""
    FamilyWorker.tap(hidden, residual, number)


class FamilyWorker(CPUWorker):
    """vLLM's worker in this process, with sites and without the rest of steer."""

    tap: ClassVar[Tap] = Tap()

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        FamilyWorker.tap = Tap()
        loaded = EagerModel(self.model_runner)
        self.tap.attached = layers.attach(
            self.model_runner.get_model(), SITES, N_LAYERS, tap, loaded
        )
