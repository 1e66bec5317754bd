"""Runs the model that vLLM has loaded, outside a step: no batch, no KV cache, no compiled code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.forward_context import set_forward_context
from vllm.sequence import IntermediateTensors

from steer_server.vllm_plugin.probe import is_attention


class EagerModel:
    """A `probe.LoadedModel`. Valid from vLLM's `load_model` on; a run leaves no trace."""

    def __init__(self, runner: Any) -> None:
        """`runner` is the model runner that has loaded it."""
        self._runner = runner
        self._model: Any = runner.get_model()
        self._config: VllmConfig = runner.vllm_config
        self.max_rows = self._config.scheduler_config.max_num_batched_tokens
        self.ends_here = get_pp_group().is_last_rank
        self._device = next(self._model.parameters()).device

    @torch.inference_mode()
    def run(self, rows: int) -> Tensor:
        with (
            _zero_attention(self._model),
            # Some models compile small functions of their own at the first call.
            torch.compiler.set_stance("force_eager"),
            set_forward_context(None, self._config, num_tokens=rows, skip_compiled=True),
            # Rows without an adapter: until vLLM has a batch, what a layer looks them up in is uninitialised.
            self._runner.maybe_select_dummy_loras(self._config.lora_config, np.array([rows])),
        ):
            output = self._model(**self._inputs(rows))
        return torch.cat([part.reshape(rows, -1).float() for part in _parts(output)], dim=1)

    def replicated(self, x: Tensor) -> bool:
        group = get_tp_group()
        if group.world_size == 1:
            return True
        copies = group.all_gather(x.unsqueeze(0).contiguous(), dim=0)
        return all(torch.equal(copies[0], copy) for copy in copies)

    def _inputs(self, rows: int) -> dict[str, Any]:
        model_config = self._config.model_config
        positions = torch.ones(rows, dtype=torch.int64, device=self._device)
        token = model_config.get_vocab_size() // 2
        intermediate = None
        if not get_pp_group().is_first_rank:
            intermediate = self._model.make_empty_intermediate_tensors(
                rows, model_config.dtype, self._device
            )
            for tensor in intermediate.tensors.values():
                tensor.copy_(torch.linspace(-1, 1, tensor.shape[-1]))
        return {
            "input_ids": torch.full((rows,), token, device=self._device),
            "positions": positions.expand(3, rows) if model_config.uses_mrope else positions,
            "intermediate_tensors": intermediate,
            "inputs_embeds": None,
        }


def _parts(output: Any) -> list[Tensor]:
    """The model's output, of whatever this rank returns."""
    if isinstance(output, IntermediateTensors):
        return list(output.tensors.values())
    return [output if isinstance(output, Tensor) else output[0]]


@contextmanager
def _zero_attention(model: nn.Module) -> Iterator[None]:
    """Without metadata vLLM's attention leaves its output zero or, on CPU, uninitialised.

    No hooks, because models of transformers call `forward` of the attention directly.
    """
    attentions = [module for module in model.modules() if is_attention(module)]
    own = [module.__dict__.get("forward") for module in attentions]
    for module in attentions:
        module.forward = _zeroed(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(attentions, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _zeroed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def zeroed(*args: Any, **named: Any) -> Any:
        output = forward(*args, **named)
        return output.zero_() if isinstance(output, Tensor) else output

    return zeroed
