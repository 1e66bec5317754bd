"""The language model as the trainer sees it: sites to read, or one to replace, and nothing after them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from steer_server.dictionary.card import model_shape
from steer_server.dictionary.site import Site
from trainer.errors import BadConfig
from trainer.files import sha256

Read = Callable[[Sequence[Site], Tensor], list[Tensor]]
"""Gives the sites' tensors, contexts x positions x d_model, of contexts that are full to the end."""

_LAYERS = ("layers", "h", "blocks")
_SUBLAYERS = {
    "mlp_out": ("mlp", "feed_forward", "ffn"),
    "attn_out": ("self_attn", "attn", "attention", "self_attention"),
}


def load_model(name: str) -> nn.Module:
    """The whole causal model in its own dtype, ready for inference, on a GPU if there is one."""
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except OSError as error:
        raise BadConfig(
            f"model {name!r} is neither a Hugging Face folder nor a hub id that can be read; "
            f"`python -m trainer model --out {name}` makes a small real one: {error}"
        ) from error
    return nn.Module.to(model.eval().requires_grad_(False), device())


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(name)


def device() -> torch.device:
    """Where tensors are computed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shape_of(name: str) -> dict[str, Any]:
    """The model's shape, for cards."""
    return model_shape(AutoConfig.from_pretrained(name).get_text_config())


def revision(name: str) -> str:
    """sha256 over the weights of a folder; the commit of a hub id."""
    if not Path(name).is_dir():
        return _file(name, "config.json").parent.name
    weights = sorted(Path(name).glob("*.safetensors"))
    return "+".join(sha256(path) for path in weights) or "no safetensors"


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, found by structure: its longest list named layers, h or blocks."""
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _LAYERS
    ]
    if not lists:
        raise BadConfig(f"{type(model).__name__} has no list of modules named {_LAYERS}")
    return max(lists, key=len)


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """The module whose output is the site."""
    layers = decoder_layers(model)
    if site.layer >= len(layers):
        raise BadConfig(f"site {site} does not exist: the model has layers 0..{len(layers) - 1}")
    layer = layers[site.layer]
    if site.stream == "resid_post":
        return layer
    for name, child in layer.named_children():
        if name in _SUBLAYERS[site.stream]:
            return child
    raise BadConfig(f"{type(layer).__name__} has no child named {_SUBLAYERS[site.stream]}")


def truncate(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """The model without its head and without the layers after the last site; their memory can be freed."""
    for site in sites:
        site_module(model, site)
    body = model.get_submodule(str(getattr(model, "base_model_prefix", "")))
    layers = decoder_layers(body)
    del layers[max(site.layer for site in sites) + 1 :]
    return body


@contextmanager
def site_hook(
    model: nn.Module, site: Site, change: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """While entered, `change` sees the site's tensor in every forward pass and may replace it."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        changed = change(x)
        if changed is None:
            return output
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = site_module(model, site).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def read_sites(model: nn.Module, sites: Sequence[Site], contexts: Tensor) -> list[Tensor]:
    """The sites' tensors, contexts x positions x d_model, in one pass over contexts that are full to the end."""
    seen: list[list[Tensor]] = [[] for _ in sites]
    with ExitStack() as hooks, torch.inference_mode():
        for site, found in zip(sites, seen, strict=True):
            hooks.enter_context(site_hook(model, site, found.append))
        model(input_ids=contexts.to(device()), use_cache=False)
    return [x for (x,) in seen]


def _file(name: str, file: str) -> Path:
    if Path(name).is_dir():
        return Path(name) / file
    path = cached_file(name, file)
    if path is None:
        raise BadConfig(f"model {name!r} has no {file}")
    return Path(path)
