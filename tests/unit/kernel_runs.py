"""Runs the Triton kernels where they can run: on a GPU, or in a process in which Triton interprets them.

Triton decides that when it is imported, so nothing here imports it at the top.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

UNTOUCHED = -7.0
"""What the output tables hold before a run."""


@dataclass
class EditCase:
    """A batch and its tables; the outputs are made by the run."""

    hidden: Tensor
    residual: Tensor | None
    bank: tuple[Tensor, ...]
    lines: tuple[Tensor, ...]
    row_line: Tensor
    row_read: Tensor
    extra_columns: int = 0
    """How much longer than d_model a row of the buffer that holds `hidden` is."""


@dataclass
class Edited:
    hidden: Tensor
    change: Tensor
    x_norm: Tensor
    size: Tensor
    applied: Tensor
    x_before: Tensor
    x_after: Tensor
    beside: Tensor
    """The extra columns of the buffer."""


Run = Callable[..., Any]


@contextmanager
def process(interpret: bool) -> Iterator[Run]:
    """A function that calls functions of this module in a process of their own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _start, (interpret,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _start(interpret: bool) -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    torch.set_num_threads(1)


def edit(device: str, case: EditCase) -> Edited:
    from steer_server.vllm_plugin.edit_kernel import Bank, Lines, Outcome, edit_rows

    # A tensor from another process shares its memory with it.
    def place(tensor: Tensor) -> Tensor:
        return tensor.clone().to(device)

    n_rows, d_model = case.hidden.shape
    max_rows, entries = case.row_line.shape[0], case.lines[1].shape[1]
    buffer = torch.nn.functional.pad(place(case.hidden), (0, case.extra_columns), value=UNTOUCHED)
    hidden = buffer[:, :d_model]
    out = Outcome(
        *[
            torch.full(shape, UNTOUCHED, device=device, dtype=dtype)
            for shape, dtype in (
                ((max_rows, entries), torch.float32),
                ((max_rows,), torch.float32),
                ((max_rows,), torch.float32),
                ((max_rows,), torch.int32),
                ((max_rows, d_model), torch.float32),
                ((max_rows, d_model), torch.float32),
            )
        ]
    )
    residual = None if case.residual is None else place(case.residual)
    bank, lines = Bank(*map(place, case.bank)), Lines(*map(place, case.lines))
    edit_rows(hidden, residual, bank, lines, place(case.row_line), place(case.row_read), out)
    assert hidden.shape[0] == n_rows
    tensors = (hidden.contiguous(), *out, buffer[:, d_model:].contiguous())
    return Edited(*[tensor.cpu() for tensor in tensors])


def encode(
    device: str, x: Tensor, tables: tuple[Tensor, Tensor, Tensor], k: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from steer_server.vllm_plugin.encode_kernel import encode_topk

    if options.get("rows") is not None:
        options["rows"] = options["rows"].to(device)
    top = encode_topk(x.to(device), *[table.to(device) for table in tables], k, **options)
    features, values, active = (tensor.cpu() for tensor in top)
    return features, values, active


def products(
    device: str, mask: Tensor, values: Tensor, W: Tensor, g: Tensor, most: int, precision: str
) -> dict[str, Tensor]:
    """What `Compressed` says of the entries of `values` where `mask` is true."""
    from trainer.active_cuda import Compressed

    mask, values, W, g = (part.to(device) for part in (mask, values, W, g))
    return everything(Compressed.at(mask, values, most, precision), W, g)


def everything(f: Any, W: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Every function of an `Active`, at full width."""
    members, features, _ = W.shape
    of_member = torch.arange(1.0, 1 + members, device=g.device)
    of_feature = torch.arange(1.0, 1 + members * features, device=g.device)
    numbers = of_feature.view(members, features)
    changed = f.pull(g, W)
    changed = changed.like(changed.values * f.of_member(of_member) + f.of_feature(numbers))
    every_feature = torch.eye(features, device=g.device).expand(members, -1, -1)
    part = f.only(f.values > 0).columns(1, 6)
    found = {
        "decode": f.decode(W),
        "transposed": f.transposed(g),
        "pull, of_member, of_feature": changed.decode(every_feature),
        "sum_tokens": f.sum_tokens(),
        "count": f.count(),
        "fired": f.fired(),
        "nth_largest": f.nth_largest([2, 10**6][:members]),
        "only, columns": part.decode(every_feature[:, 1:6]),
        "only, columns, for all members": part.transposed(g[0]),
        "only, columns, count": part.count(),
    }
    return {name: value.cpu() for name, value in found.items()}


def compressed(device: str, mask: Tensor, values: Tensor, most: int) -> list[Tensor]:
    """The buffers of the entries: `key`, `row` and values."""
    from trainer.active_cuda import Compressed

    f = Compressed.at(mask.to(device), values.to(device), most)
    return [part.cpu() for part in (f._places.key, f._places.row, f.values)]


def step(device: str, name: str, p: dict[str, Tensor], x: Tensor, hyper: Any) -> Any:
    """A step of the architecture with `Compressed` in all places; on CPU, too."""
    from trainer import penalised, top_k
    from trainer.active_cuda import Compressed
    from trainer.architectures import ARCHITECTURES

    def at(mask: Tensor, values: Tensor, precision: Any, most: int | None = None) -> Compressed:
        return Compressed.at(mask, values, most or int(mask.count_nonzero()), precision)

    def at_columns(columns: Tensor, keep: Tensor, values: Tensor, precision: Any) -> Compressed:
        mask = torch.zeros_like(values, dtype=torch.bool).scatter_(2, columns, keep)
        return at(mask, values, precision, columns.numel())

    def place(tensor: Any) -> Any:
        return tensor.clone().to(device) if isinstance(tensor, Tensor) else tensor

    usual = top_k.at, top_k.at_columns
    penalised.at = top_k.at = at
    top_k.at_columns = at_columns
    hyper = replace(hyper, **{f.name: place(getattr(hyper, f.name)) for f in fields(hyper)})
    p = {key: place(value) for key, value in p.items()}
    try:
        outcome, gradients = ARCHITECTURES[name].step(p, x.to(device), hyper)
    finally:
        top_k.at, top_k.at_columns = usual
        penalised.at = top_k.at
    return {key: value.cpu() for key, value in (outcome._asdict() | gradients).items()}


def compile_for_cuda(arch: int, cache: str) -> dict[str, int]:
    """Compiles what a launch of each kernel needs, down to machine code; its size by kernel. Needs no GPU."""
    os.environ["TRITON_CACHE_DIR"] = cache
    from benchmarks.kernel_resources import only_compile

    compiled = only_compile(arch)
    from steer_server.vllm_plugin import edit_kernel, encode_kernel

    n, d_model = 16, 576
    for width in (edit_kernel.MAX_D_MODEL, d_model):
        real, whole = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.int32)
        bank = edit_kernel.Bank(real, real[0], real[0], real, real[0])
        lines = edit_kernel.Lines(whole[0], whole, *[real] * 5, whole, real, real[0], real[0])
        out = edit_kernel.Outcome(real, real[0], real[0], whole[0], real, real)
        hidden = real.to(torch.bfloat16)
        edit_kernel.edit_rows(hidden, hidden.clone(), bank, lines, whole[0], whole[0], out)
    encode_kernel.encode_topk(real, real, real[0], real[0], 8, rows=whole[0, :n])

    from trainer.active_cuda import Compressed

    f = Compressed.at(real[None] > 0, real[None], 64, "bfloat16")
    W = torch.zeros(1, d_model, 300)
    f.pull(torch.zeros(1, n, 300), W).decode(W)
    f.sum_tokens()
    return {kernel.metadata.name: len(kernel.asm["cubin"]) for kernel in compiled}


def compile_while_serving() -> tuple[set[str], set[str]]:
    """What `encode_kernel.warm_up` has to be compiled, and what read-outs of all kinds do; compiles nothing."""
    import triton

    from benchmarks.kernel_resources import only_compile

    asked: set[str] = set()

    def ask(key: str, **rest: Any) -> bool:
        asked.add(f"{rest['fn'].name} {key}")
        return True

    only_compile(arch=90)
    triton.knobs.runtime.jit_cache_hook = ask
    from steer_server.vllm_plugin import encode_kernel

    d_model = 64
    encode_kernel.warm_up(d_model, torch.device("cpu"))
    warm = set(asked)
    asked.clear()
    x = torch.zeros(200, d_model)
    for n_features in (16, 129, 4609):
        encoder, nothing = torch.zeros(n_features, d_model), torch.zeros(n_features)
        for first, last in ((3, 4), (0, 32), (5, 38), (0, 200)):
            for k in (1, 16, 33, 128):
                encode_kernel.encode_topk(x[first:last], encoder, nothing, nothing, k)
    return warm, asked


def whole(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator).float()


def some(generator: torch.Generator, values: list[float], *shape: int) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]
