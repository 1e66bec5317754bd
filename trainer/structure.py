"""Where a model's sites are, found by structure and by running the model on a few tokens, never by class names.

The sublayers of a decoder layer are its children that hold a matrix. The one in which a position sees another is the
attention, the one in which it does not is the MLP; `attn_out` and `mlp_out` are what they return, before a norm or a factor
that the layer itself applies, as in the server. `attn_z` and `mlp_act` are the input of the linear module whose output is,
up to a constant factor, all that the sublayer returns. What does not behave so is refused by name.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steer_server.dictionary.site import Site
from trainer.errors import BadConfig

_TOKENS = 4
_LEAST_EFFECT = 1e-3
"""Of a module's output, the least share that another position's x moves if it is seen."""
_ROUNDING = 0.02
"""Tensors that differ by less than this share are equal; bfloat16 has three digits."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a site's x is in a model."""

    module: nn.Module
    is_input: bool
    """Whether x is what the module takes, rather than what it returns."""
    to_stream: tuple[nn.Module, ...] = ()
    """What x goes through, in this order, before the layer adds it to the residual stream."""


@dataclass(frozen=True, eq=False)
class _Sublayer:
    name: str
    module: nn.Module
    mixes: bool | None
    """Whether a position sees another; None if that cannot be told."""
    projection: nn.Module | None
    post_norm: nn.Module | None
    fault: str
    """Why its output is not a site, if it is none."""


@dataclass(frozen=True, eq=False)
class _Layer:
    sublayers: tuple[_Sublayer, ...]
    fault: str
    """Why its output is not the residual stream, if it is not."""


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


_UNDERSTOOD: WeakKeyDictionary[nn.Module, _Layer] = WeakKeyDictionary()
"""By decoder layer: a model that loses its last layers is not run again."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers: the longest list, of those in no other list, whose modules all hold a matrix."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [
        layers
        for name, layers in lists.items()
        if len(layers)
        and all(map(_has_matrix, layers))
        and not any(name.startswith(f"{other}.") for other in lists)
    ]
    longest = [layers for layers in outer if len(layers) == max(map(len, outer))]
    if len(longest) != 1:
        raise BadConfig(
            f"{type(model).__name__} should have one list of decoder layers, it has {len(longest)}"
        )
    return longest[0]


def place(model: nn.Module, site: Site) -> Place:
    """Where the site is; BadConfig says why if the model has no such site."""
    layers = decoder_layers(model)
    if site.layer >= len(layers):
        raise BadConfig(f"site {site} does not exist: the model has layers 0..{len(layers) - 1}")
    layer = layers[site.layer]
    if layer not in _UNDERSTOOD:
        _understand(model, layers)
    found = _UNDERSTOOD[layer]
    if site.stream == "resid_post":
        if found.fault:
            raise BadConfig(f"site {site}: {type(layer).__name__} {found.fault}")
        return Place(layer, is_input=False)
    sublayer = _sublayer(layer, found, site)
    after = () if sublayer.post_norm is None else (sublayer.post_norm,)
    if not site.inner:
        return Place(sublayer.module, is_input=False, to_stream=after)
    if sublayer.projection is None:
        raise BadConfig(
            f"site {site}: no linear module of {type(sublayer.module).__name__} gives all that it returns; "
            "train at its output instead"
        )
    return Place(sublayer.projection, is_input=True, to_stream=(sublayer.projection, *after))


def main_tensor(output: Any) -> Tensor:
    """The tensor of a module's output that goes on through the model."""
    return output if isinstance(output, Tensor) else output[0]


def _sublayer(layer: nn.Module, found: _Layer, site: Site) -> _Sublayer:
    attention = site.stream in ("attn_out", "attn_z")
    those = [part for part in found.sublayers if part.mixes in (attention, None)]
    if len(those) != 1:
        kind = "attention" if attention else "MLP"
        names = ", ".join(sublayer.name for sublayer in those) or "none"
        raise BadConfig(
            f"site {site}: {type(layer).__name__} should have one child that is its {kind}, found {names} "
            f"among {', '.join(name for name, _ in layer.named_children())}"
        )
    (sublayer,) = those
    if sublayer.fault:
        raise BadConfig(f"site {site}: {type(sublayer.module).__name__} {sublayer.fault}")
    return sublayer


@torch.inference_mode()
def _understand(model: nn.Module, layers: nn.ModuleList) -> None:
    children = [child for layer in layers for child in layer.children()]
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    with _recorded([*layers, *children, *linears]) as calls:
        first = next(model.parameters())
        ids = torch.arange(1, _TOKENS + 1, device=first.device)[None]
        model(input_ids=ids, use_cache=False)
    for number, layer in enumerate(layers):
        following = layers[number + 1] if number + 1 < len(layers) else None
        _UNDERSTOOD[layer] = _Layer(
            tuple(
                _look_at(name, child, layer, calls)
                for name, child in layer.named_children()
                if _has_matrix(child)
            ),
            _layer_fault(layer, following, calls),
        )


@contextmanager
def _recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[_Call]]]:
    calls: dict[nn.Module, list[_Call]] = {module: [] for module in modules}

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Copies, for a layer may add to its stream in place.
        kept = {name: _copy(value) for name, value in kwargs.items()}
        calls[module].append(_Call(tuple(map(_copy, args)), kept, _copy(output)))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _look_at(
    name: str, module: nn.Module, layer: nn.Module, calls: dict[nn.Module, list[_Call]]
) -> _Sublayer:
    own = calls[module]
    if len(own) != 1:
        return _Sublayer(name, module, None, None, None, f"runs {len(own)} times in a pass")
    (call,) = own
    mixes = _mixes(module, call)
    streams = _streams(call)
    if mixes is None or len(streams) != 1:
        # Two: it adds the residual stream itself, so what it returns is not its own contribution.
        fault = f"takes {len(streams)} tensors of the shape that it returns, it should take one"
        return _Sublayer(name, module, mixes, None, None, fault)
    out = main_tensor(call.output)
    projections = [
        part
        for part in module.modules()
        if len(calls.get(part, ())) == 1 and part is not module and _gives(calls[part][0], out)
    ]
    norms = [
        child
        for child in layer.children()
        if not _has_matrix(child) and any(map(_takes(out), calls[child]))
    ]
    return _Sublayer(
        name,
        module,
        mixes,
        projections[0] if len(projections) == 1 else None,
        norms[0] if norms else None,
        "",
    )


def _layer_fault(
    layer: nn.Module, following: nn.Module | None, calls: dict[nn.Module, list[_Call]]
) -> str:
    if len(calls[layer]) != 1:
        return f"runs {len(calls[layer])} times in a pass"
    (call,) = calls[layer]
    if not _streams(call):
        return "does not return a tensor of the shape that it takes"
    if following is not None and len(calls[following]) == 1:
        taken = _streams(calls[following][0])
        if not taken or not _equal(taken[0], main_tensor(call.output)):
            return "returns something else than the next layer takes"
    return ""


def _given(call: _Call) -> list[Tensor]:
    """What it takes that has a row for each position."""
    return [
        x
        for x in (*call.args, *call.kwargs.values())
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape[-2:-1] == (_TOKENS,)
    ]


def _returned(call: _Call) -> Tensor | None:
    """The tensor that it returns, if that has a row for each position."""
    out = call.output[0] if isinstance(call.output, tuple) and call.output else call.output
    return out if isinstance(out, Tensor) and out.shape[-2:-1] == (_TOKENS,) else None


def _streams(call: _Call) -> list[Tensor]:
    """What it takes of the shape [1, tokens, width] that it returns."""
    out = _returned(call)
    if out is None or out.ndim != 3:
        return []
    return [x for x in _given(call) if x.shape == out.shape]


def _mixes(module: nn.Module, call: _Call) -> bool | None:
    """Whether the last position's output changes with the first position's x."""
    given, before = _given(call), _returned(call)
    if not given or before is None:
        return None
    x = given[0]
    other = x.clone()
    noise = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0))
    other[..., 0, :] += noise.to(x) * x.float().square().mean().sqrt().to(x)

    def swap(value: Any) -> Any:
        return other if value is x else value

    out = module(*map(swap, call.args), **{name: swap(v) for name, v in call.kwargs.items()})
    last = before[..., -1, :].float()
    moved = main_tensor(out)[..., -1, :].float() - last
    return bool(moved.norm() > _LEAST_EFFECT * last.norm())


def _gives(call: _Call, out: Tensor) -> bool:
    """Whether the linear module's output is `out` up to a constant factor, for an input of as many positions."""
    given, own = call.args[0], call.output
    if own.shape != out.shape or given.shape[:-1] != out.shape[:-1]:
        return False
    factor = (own.double() * out.double()).sum() / own.double().square().sum()
    return bool(factor != 0) and _equal(own * factor.to(own), out)


def _takes(x: Tensor):
    def test(call: _Call) -> bool:
        given = call.args[0] if call.args else None
        return isinstance(given, Tensor) and given.shape == x.shape and _equal(given, x)

    return test


def _equal(one: Tensor, other: Tensor) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= _ROUNDING * other.norm())


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _copy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copy, value))
    return value.clone() if isinstance(value, Tensor) else value
