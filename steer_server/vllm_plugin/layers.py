"""Finds where the sites are in a model that vLLM has loaded, by structure and not by class name."""

import inspect
import re
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from steer_server.dictionary.site import Site
from steer_server.errors import UnsupportedVllm

_LIST_NAMES = ("layers", "h", "blocks")

# vLLM's llama-like layers leave the addition of the residual to the next fused norm. Some others return a pair as
# well, but have added it already; read as a sum, their x would be wrong everywhere and nobody would notice.
_LEFT_TO_THE_NORM = re.compile(r"norm\w*\(\s*(x=)?hidden_states,\s*(residual=)?residual\s*\)")
_ADDED_BY_THE_LAYER = re.compile(r"residual\s*\+|\+\s*residual|hidden_states\s*\+=")

SiteCall = Callable[[Tensor, Tensor | None, int], None]
"""Called with a layer's (hidden, residual, site number); x is their sum."""


def attach(model: nn.Module, sites: Sequence[Site], n_layers: int, call: SiteCall) -> None:
    """Hooks `call` behind each site; UnsupportedVllm if the model's structure is not understood."""
    layers = decoder_layers(model, n_layers)
    for number, site in enumerate(sites):
        if site.stream != "resid_post":
            raise UnsupportedVllm(f"site {site}: this version serves resid_post sites only")
        if site.layer >= n_layers:
            raise UnsupportedVllm(f"site {site}: the model has layers 0..{n_layers - 1}")
        layer = layers[site.layer]
        layer.register_forward_hook(_hook(call, number, _returns_addends(layer)))


def decoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The longest ModuleList named layers, h or blocks; it must hold as many as the config says."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _LIST_NAMES
    ]
    name, layers = max(found, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    if len(layers) != n_layers:
        raise UnsupportedVllm(
            f"{type(model).__name__}: expected {n_layers} decoder layers in a list named one of "
            f"{', '.join(_LIST_NAMES)}, found {len(layers)} in {name or 'none'}"
        )
    return layers


def _returns_addends(layer: nn.Module) -> bool:
    """Whether a pair that the layer returns is (hidden, residual) with x their sum, by its own code."""
    source = inspect.getsource(type(layer).forward)
    return bool(_LEFT_TO_THE_NORM.search(source)) and not _ADDED_BY_THE_LAYER.search(source)


def _hook(call: SiteCall, number: int, addends: bool) -> Callable[..., object]:
    def after(module: nn.Module, args: object, output: object) -> object:
        # torch.compile traces this, so it stays with what dynamo knows.
        if isinstance(output, Tensor):
            call(output, None, number)
        elif addends and isinstance(output, tuple) and len(output) == 2:
            call(output[0], output[1], number)
        else:
            raise UnsupportedVllm(
                f"{type(module).__name__} returns something this version does not understand; it takes a "
                "tensor, or (hidden, residual) whose sum a norm of the next layer takes"
            )
        return output

    return after
