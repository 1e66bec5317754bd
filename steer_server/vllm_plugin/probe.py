"""What a module's output means, decided by running the loaded model.

A site is what a transformers forward hook sees and may replace. vLLM's layers differ in how they carry it: one tensor;
a pair whose sum the next layer takes; a pair of which only the first counts. And not every output may be written in place.
Attention is switched off, so that the rows of a batch do not see each other. Then, with a row of equal tokens for each site:

* h, the one tensor or the first of a pair, is replaced by h + d, and in another run overwritten by it: the model's output
  must move, and be the same both times;
* a pair (h, r) is replaced by (a, b), (a + d, b), (a, b + d) and (a + d, b - d) on four rows: a model that reads the sum gives
  equal outputs for the first and last and for the two in between; one that reads h, for those of equal h.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from steer_server.dictionary.site import Site
from steer_server.errors import UnsupportedVllm

_ROWS = 4
_ROUNDING = 0.05
"""Outputs this near, as a share of what d moves, are equal; a wrong reading is off by about 1."""
_LEAST_EFFECT = 1e-3
"""The least share of the model's output that a d as large as x moves."""

_Change = Callable[[Any], Any]
"""Takes a module's output and returns what replaces it; None leaves it."""


class LoadedModel(Protocol):
    """The part of the model that is in this process, as the probe may run it."""

    max_rows: int
    """Most tokens of a run."""
    ends_here: bool
    """Whether what follows the last layer is in this process."""

    def run(self, rows: int) -> Tensor:
        """The output for `rows` equal tokens, [rows, any], with attention's outputs zero."""
        ...

    def replicated(self, x: Tensor) -> bool:
        """Whether all tensor-parallel ranks have the same x."""
        ...


@dataclass(frozen=True)
class Place:
    """A site in this process."""

    number: int
    """Its index in the list of sites."""
    site: Site
    module: nn.Module
    layer: nn.Module
    """The decoder layer that the module is, or is part of."""
    witness: nn.Module | None
    """A layer of the same class whose output is read in this process, itself if it can be; else None."""

    def refusal(self, reason: str) -> UnsupportedVllm:
        return UnsupportedVllm(f"site {self.site}: {type(self.module).__name__} {reason}")


class _Seen(NamedTuple):
    """The tensors that a place's module and its layer returned."""

    module: tuple[Tensor, ...]
    layer: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Draw:
    """The numbers for a place. Small integers times a power of two, so that their sums are exact in any dtype."""

    a: Tensor
    b: Tensor
    d: Tensor


def is_attention(module: nn.Module) -> bool:
    """Whether it is one of vLLM's attention-like layers, by the interface of its AttentionLayerBase."""
    return hasattr(module, "get_kv_cache_spec")


def main_tensor(output: Any) -> Tensor:
    """The tensor of a module's output that an edit is written to."""
    return output if isinstance(output, Tensor) else output[0]


def understand(places: Sequence[Place], loaded: LoadedModel) -> list[bool]:
    """For each place, whether x is the sum of a returned pair; if not, it is the first tensor.

    UnsupportedVllm, by name, if x is neither or an edit in place would not be what a hook's replacement is.
    """
    size = max(1, loaded.max_rows // _ROWS)
    groups = [places[start : start + size] for start in range(0, len(places), size)]
    return [meaning for group in groups for meaning in _understand(group, loaded)]


def _understand(places: Sequence[Place], loaded: LoadedModel) -> list[bool]:
    plain, seen = _look(places, loaded)
    draws = [_draw(place, output.layer) for place, output in zip(places, seen, strict=True)]
    _check_arrival(places, draws, plain, loaded)
    pairs = [
        (place, draw)
        for place, draw, output in zip(places, draws, seen, strict=True)
        if place.module is place.layer and _is_pair(output.module)
    ]
    sums = dict(zip((place for place, _ in pairs), _read_pairs(pairs, loaded), strict=True))
    return [sums.get(place, False) for place in places]


def _look(places: Sequence[Place], loaded: LoadedModel) -> tuple[Tensor, list[_Seen]]:
    """The undisturbed model's output, and the tensors that each place and its layer returned."""
    seen: dict[nn.Module, list[Any]] = {
        module: [] for place in places for module in (place.module, place.layer)
    }

    def record(module: nn.Module) -> _Change:
        return lambda output: seen[module].append(_copy(output))

    plain = _run(loaded, len(places) + 1, [(module, record(module)) for module in seen])
    if not plain.isfinite().all():
        raise places[0].refusal("cannot be probed: the model's output is not finite")
    for place in places:
        for module in (place.module, place.layer):
            if len(seen[module]) != 1:
                calls = f"{type(module).__name__} runs {len(seen[module])} times in a pass"
                raise place.refusal(f"cannot be edited: {calls}")
        _check_output(place, seen[place.module][0], len(plain), loaded)
    tensors = [
        _Seen(_tensors(seen[place.module][0]), _tensors(seen[place.layer][0])) for place in places
    ]
    for place, (own, layers) in zip(places, tensors, strict=True):
        if not layers or own[0].shape[-1] != layers[0].shape[-1]:
            raise place.refusal("returns a tensor that is not as wide as its layer's")
    return plain, tensors


def _check_output(place: Place, output: Any, rows: int, loaded: LoadedModel) -> None:
    tensors = _tensors(output)
    most = 2 if place.module is place.layer else 1
    alike = [tensor for tensor in tensors if tensor.shape == tensors[0].shape]
    first = output[0] if isinstance(output, tuple) and output else output
    if (
        not isinstance(first, Tensor)
        or first.shape[:-1] not in ((rows,), (1, rows))
        or len(alike) > most
        or (len(alike) == 2 and len(output) != 2)
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor"
        raise place.refusal(
            f"returns {type(output).__name__} with {shapes}; it takes one tensor of {rows} tokens, or a layer's pair"
        )
    if not all(loaded.replicated(tensor) for tensor in alike):
        raise place.refusal("returns other values on other tensor-parallel ranks")


def _check_arrival(
    places: Sequence[Place], draws: Sequence[_Draw], plain: Tensor, loaded: LoadedModel
) -> None:
    """Each place gets + d on a row: by replacing the output, as transformers does, and in place, as the op does."""
    rows = list(enumerate(zip(places, draws, strict=True)))
    replaced = _run(loaded, len(plain), [(p.module, _replace_row(i, d.d)) for i, (p, d) in rows])
    written = _run(loaded, len(plain), [(p.module, _write_row(i, d.d)) for i, (p, d) in rows])
    if not _near(replaced[-1], plain[-1], plain[-1]):
        raise places[0].refusal("cannot be probed: tokens see each other without attention")
    for row, place in enumerate(places):
        effect = replaced[row] - plain[row]
        if effect.norm() <= _LEAST_EFFECT * plain[row].norm():
            raise place.refusal("returns a tensor that the model does not use")
        if not _near(written[row], replaced[row], effect):
            raise place.refusal("returns a tensor that cannot be edited in place")


def _read_pairs(pairs: Sequence[tuple[Place, _Draw]], loaded: LoadedModel) -> list[bool]:
    """Whether the model reads the sum of each place's pair, rather than the first of it alone."""
    if not pairs:
        return []
    changes = [(_witness(p), _replace_pair(_ROWS * k, d)) for k, (p, d) in enumerate(pairs)]
    after = _run(loaded, _ROWS * len(pairs), changes).unflatten(0, (-1, _ROWS))
    return [_is_sum(place, *rows) for (place, _), rows in zip(pairs, after, strict=True)]


def _is_sum(place: Place, base: Tensor, h: Tensor, r: Tensor, both: Tensor) -> bool:
    """Whether the model reads h + r, by its outputs for (a, b), (a + d, b), (a, b + d) and (a + d, b - d)."""
    effect = h - base
    if effect.norm() > _LEAST_EFFECT * base.norm():
        if _near(h, r, effect) and _near(base, both, effect):
            return True
        if _near(base, r, effect) and _near(h, both, effect):
            return False
    raise place.refusal(
        "returns a pair of which the model reads neither the sum nor the first only"
    )


def _near(one: Tensor, other: Tensor, effect: Tensor) -> bool:
    return bool((one - other).norm() <= _ROUNDING * effect.norm())


def _witness(place: Place) -> nn.Module:
    if place.witness is None:
        raise place.refusal(
            "returns a pair that another pipeline rank reads, and no other layer of its class is here to tell how"
        )
    return place.witness


def _draw(place: Place, tensors: tuple[Tensor, ...]) -> _Draw:
    size = max(float(tensor.float().square().mean().sqrt()) for tensor in tensors)
    if not math.isfinite(size):
        raise place.refusal("cannot be probed: its layer's output is not finite")
    scale = 2.0 ** round(math.log2(size)) if size else 1.0
    numbers = torch.randint(
        -8, 9, (3, tensors[0].shape[-1]), generator=torch.Generator().manual_seed(place.number)
    )
    return _Draw(*(numbers * scale).to(tensors[0]))


def _tensors(output: Any) -> tuple[Tensor, ...]:
    items = output if isinstance(output, tuple) else (output,)
    return tuple(item for item in items if isinstance(item, Tensor))


def _is_pair(tensors: Sequence[Tensor]) -> bool:
    return len(tensors) == 2 and tensors[0].shape == tensors[1].shape


def _copy(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_copy(item) for item in output)
    return output.clone() if isinstance(output, Tensor) else output


def _rows(tensor: Tensor) -> Tensor:
    """[tokens, d_model], of a tensor that may have a batch dimension of one; shares memory."""
    return tensor.squeeze(0) if tensor.ndim == 3 else tensor


def _replace_pair(first: int, draw: _Draw) -> _Change:
    a, b, d = draw.a, draw.b, draw.d
    block = slice(first, first + _ROWS)

    def change(output: Any) -> Any:
        h, r = _copy(output)
        _rows(h)[block] = torch.stack([a, a + d, a, a + d]).to(h.dtype)
        _rows(r)[block] = torch.stack([b, b, b + d, b - d]).to(r.dtype)
        return h, r

    return change


def _replace_row(row: int, d: Tensor) -> _Change:
    def change(output: Any) -> Any:
        replacement = _copy(output)
        _rows(main_tensor(replacement))[row] += d
        return replacement

    return change


def _write_row(row: int, d: Tensor) -> _Change:
    def change(output: Any) -> None:
        _rows(main_tensor(output))[row] += d

    return change


def _run(loaded: LoadedModel, rows: int, changes: Sequence[tuple[nn.Module, _Change]]) -> Tensor:
    with _hooked(changes):
        return loaded.run(rows)


@contextmanager
def _hooked(changes: Sequence[tuple[nn.Module, _Change]]) -> Iterator[None]:
    handles = []
    try:
        for module, change in changes:
            handles.append(
                module.register_forward_hook(
                    lambda _module, _args, output, change=change: change(output)
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
