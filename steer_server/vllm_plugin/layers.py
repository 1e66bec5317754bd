"""Finds where the sites are in a model that vLLM has loaded, by structure and not by class name."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from steer_server.dictionary.site import Site
from steer_server.errors import UnsupportedVllm

_LIST_NAMES = ("layers", "h", "blocks")

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
        layers[site.layer].register_forward_hook(_hook(call, number))


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


def _hook(call: SiteCall, number: int) -> Callable[..., object]:
    def after(module: nn.Module, args: object, output: object) -> object:
        # torch.compile traces this, so it stays with what dynamo knows.
        if isinstance(output, Tensor):
            call(output, None, number)
        elif isinstance(output, tuple) and len(output) == 2:
            call(output[0], output[1], number)
        else:
            raise UnsupportedVllm(
                f"{type(module).__name__} returns {type(output).__name__}; "
                "expected a tensor or (hidden, residual)"
            )
        return output

    return after
