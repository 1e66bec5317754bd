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
from trainer.structure import Place, decoder_layers, main_tensor, place

Read = Callable[[Sequence[Site], Tensor], list[Tensor]]
"""Gives the sites' tensors, contexts x positions x width, of contexts that are full to the end."""


def load_model(name: str, weights: str = "trained", seed: int = 0) -> nn.Module:
    """The whole causal model in its own dtype, ready for inference, on a GPU if there is one.

    With `random` weights it is a model of the same configuration as it is before training, by `seed`.
    """
    try:
        if weights == "random":
            model = _untrained(name, seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except OSError as error:
        raise BadConfig(
            f"model {name!r} is neither a Hugging Face folder nor a hub id that can be read; "
            f"`python -m trainer model --out {name}` makes a small real one: {error}"
        ) from error
    return nn.Module.to(model.eval().requires_grad_(False), device())


def _untrained(name: str, seed: int) -> nn.Module:
    config = AutoConfig.from_pretrained(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn in float32, so that a seed gives the same numbers, rounded, in every dtype.
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return nn.Module.to(model, config.dtype or torch.float32)


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


def truncate(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """The model without its head and without the layers after the last site; their memory can be freed."""
    for site in sites:
        place(model, site)
    body = model.get_submodule(str(getattr(model, "base_model_prefix", "")))
    layers = decoder_layers(body)
    del layers[max(site.layer for site in sites) + 1 :]
    return body


@contextmanager
def site_hook(
    model: nn.Module, site: Site, change: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """While entered, `change` sees the site's tensor in every forward pass and may replace it."""
    with hook_at(place(model, site), change):
        yield


@contextmanager
def hook_at(where: Place, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """As `site_hook`, for a place that is found already."""

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = change(arguments[0])
        return None if changed is None else (changed, *arguments[1:])

    def after(module: nn.Module, arguments: Any, output: Any) -> Any:
        changed = change(main_tensor(output))
        if changed is None or isinstance(output, Tensor):
            return changed
        return (changed, *output[1:])

    handle = (
        where.module.register_forward_pre_hook(before)
        if where.is_input
        else where.module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def read_sites(model: nn.Module, sites: Sequence[Site], contexts: Tensor) -> list[Tensor]:
    """The sites' tensors, contexts x positions x width, in one pass over contexts that are full to the end."""
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
