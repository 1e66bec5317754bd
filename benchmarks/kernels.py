"""How close the Triton kernels come to what the GPU can do, and how they compare to the same arithmetic in torch.

Every case is captured in a CUDA graph, as vLLM would run it, so no launch overhead is in the figures; kernel and torch
take turns, with the L2 cache emptied in between. Each figure is the median of CUDA-event times. The roofline is measured
on the spot: a copy for GB/s, a square matrix product for FLOP/s.

    python benchmarks/kernels.py --json build/kernels.json

`--quick` takes small cases and few rounds, to see that it runs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from steer_server.program import MAX_RELATIVE_SIZE
from steer_server.vllm_plugin.edit_kernel import Bank, Lines, Outcome, edit_rows
from steer_server.vllm_plugin.encode_kernel import Precision, encode_topk

D_MODEL, SLOTS, LINES = 4096, 256, 65
DEVICE = "cuda"
Work = Callable[[], Any]


class Clock:
    """Times captured work, with a cold L2 cache."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)

    def medians(self, **works: Work) -> dict[str, float]:
        """Milliseconds of each work; they take turns."""
        graphs = {name: _captured(work) for name, work in works.items()}
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(self.rounds + 1):
            for name, graph in graphs.items():
                self._flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                if number:
                    times[name].append(start.elapsed_time(end))
        return {name: statistics.median(found) for name, found in times.items()}


def _captured(work: Work) -> torch.cuda.CUDAGraph:
    # Compiles the kernels and lets cuBLAS allocate, which a capture does not allow.
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def roofline(clock: Clock) -> dict[str, float]:
    """GB/s of a copy, TFLOP/s of float32 products without and with tf32."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device=DEVICE)
    copy = clock.medians(copy=lambda: target.copy_(source))["copy"]
    result = {"gb_per_s": 2 * source.numel() / 1e6 / copy}
    for name, precision in (("ieee", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        result[f"{name}_tflop_per_s"] = 2 * 8192**3 / 1e9 / clock.medians(mm=lambda: a @ b)["mm"]
    torch.set_float32_matmul_precision("highest")
    return result


def edit_tables(n_rows: int, entries: int) -> tuple[Bank, Lines, Tensor, Tensor, Outcome]:
    """Every row has a line of `entries` adds and scales; no line when `entries` is 0."""
    width = max(entries, 1)

    def real(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, dtype=torch.int32, device=DEVICE)

    decoder = real(SLOTS, D_MODEL) / D_MODEL**0.5
    bank = Bank(
        real(SLOTS, D_MODEL) / D_MODEL**0.5,
        real(SLOTS),
        torch.zeros(SLOTS, device=DEVICE),
        decoder,
        decoder.norm(dim=1),
    )
    infinite = torch.full((LINES, width), torch.inf, device=DEVICE)
    counts = torch.full((LINES,), entries, dtype=torch.int32, device=DEVICE)
    counts[0] = 0
    lines = Lines(
        counts,
        whole(SLOTS, LINES, width),
        -real(LINES, width).abs(),
        real(LINES, width),
        real(LINES, width) / 100,
        -infinite,
        infinite,
        whole(SLOTS, LINES, width),
        -infinite,
        infinite[:, 0].contiguous(),
        torch.full((LINES,), MAX_RELATIVE_SIZE, device=DEVICE),
    )
    row_line = whole(LINES - 1, n_rows) + 1 if entries else whole(1, n_rows)
    out = Outcome(
        real(n_rows, width),
        real(n_rows),
        real(n_rows),
        whole(2, n_rows),
        real(n_rows, D_MODEL),
        real(n_rows, D_MODEL),
    )
    return bank, lines, row_line, torch.zeros_like(row_line), out


def edit_rows_torch(
    hidden: Tensor, residual: Tensor, bank: Bank, lines: Lines, row_line: Tensor
) -> None:
    """The kernel's arithmetic as torch calls, for lines without conditions, limits and reads."""
    x = hidden.float() + residual.float()
    x_norm = x.norm(dim=1, keepdim=True)
    line = row_line.long()
    slot = lines.slot[line].long()
    z = torch.einsum("red,rd->re", bank.encoder[slot], x) + bank.bias[slot]
    f = torch.where(z > bank.threshold[slot], z, 0.0)
    change = lines.gain[line] * f + lines.offset[line]
    change += lines.share[line] * x_norm / bank.decoder_norm[slot]
    delta = torch.einsum("re,red->rd", change, bank.decoder[slot])
    edited = (hidden.float() + delta).to(hidden.dtype)
    applied = delta.norm(dim=1, keepdim=True) <= MAX_RELATIVE_SIZE * x_norm
    applied &= edited.isfinite().all(dim=1, keepdim=True)
    hidden.copy_(torch.where(applied, edited, hidden))


def bench_edits(clock: Clock, n_rows: int, entries: int) -> dict[str, Any]:
    bank, lines, row_line, row_read, out = edit_tables(n_rows, entries)
    hidden, residual, other = (
        torch.randn(n_rows, D_MODEL, device=DEVICE).to(torch.bfloat16) for _ in range(3)
    )
    works: dict[str, Work] = {
        "kernel": lambda: edit_rows(hidden, residual, bank, lines, row_line, row_read, out)
    }
    if entries:
        other.copy_(hidden)
        works["kernel"]()
        edit_rows_torch(other, residual, bank, lines, row_line)
        torch.testing.assert_close(hidden, other, rtol=2**-7, atol=1e-2)
        works["torch"] = lambda: edit_rows_torch(other, residual, bank, lines, row_line)
    times = clock.medians(**works)
    moved = n_rows * D_MODEL * (3 * 2 + entries * 2 * 4) if entries else n_rows * 2 * 4
    return {
        "rows": n_rows,
        "entries": entries,
        **_times(times),
        "gb_per_s": moved / 1e6 / times["kernel"],
    }


def bench_encode(
    clock: Clock, n_rows: int, n_features: int, k: int, precision: Precision
) -> dict[str, Any]:
    x = torch.randn(n_rows, D_MODEL, device=DEVICE)
    encoder = torch.randn(n_features, D_MODEL, device=DEVICE) / D_MODEL**0.5
    # About 100 active features a row, as in a sparse dictionary.
    cut = torch.special.ndtri(torch.tensor(1 - 100 / n_features)).item()
    bias = torch.full((n_features,), -cut, device=DEVICE)
    threshold = torch.zeros(n_features, device=DEVICE)

    def in_torch() -> tuple[Tensor, Tensor]:
        z = torch.addmm(bias, x, encoder.T)
        return torch.where(z > threshold, z, 0.0).topk(k, dim=1)

    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    values = encode_topk(x, encoder, bias, threshold, k, precision=precision).values
    torch.testing.assert_close(values, in_torch()[0], rtol=1e-2, atol=1e-2)
    times = clock.medians(
        kernel=lambda: encode_topk(x, encoder, bias, threshold, k, precision=precision),
        torch=in_torch,
    )
    torch.set_float32_matmul_precision("highest")
    return {
        "rows": n_rows,
        "features": n_features,
        "k": k,
        "precision": precision,
        **_times(times),
        "gb_per_s": n_features * D_MODEL * 4 / 1e6 / times["kernel"],
        "tflop_per_s": 2 * n_rows * n_features * D_MODEL / 1e9 / times["kernel"],
    }


def _times(times: dict[str, float]) -> dict[str, float]:
    result = {f"{name}_ms": value for name, value in times.items()}
    if "torch" in times:
        result["speedup"] = times["torch"] / times["kernel"]
    return result


def main(options: argparse.Namespace) -> dict[str, Any]:
    clock = Clock(5 if options.quick else options.rounds)
    rows = (1, 16) if options.quick else (1, 16, 64, 512, 4096)
    widths = (4096,) if options.quick else (16384, 131072)
    precisions: tuple[Precision, ...] = ("ieee", "tf32x3", "tf32")
    peak = roofline(clock)
    edits = [(n, entries) for n in rows for entries in (0, 1, 4, 16)]
    encodes = [(n, f, 32, p) for n in rows for f in widths for p in precisions]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "d_model": D_MODEL,
        "rounds": clock.rounds,
        "roofline": peak,
        "edits": [bench_edits(clock, *case) for case in tqdm(edits, desc="edits")],
        "encode": [bench_encode(clock, *case) for case in tqdm(encodes, desc="encode")],
    }
    for case in (*result["edits"], *result["encode"]):
        case["share_of_copy"] = case["gb_per_s"] / peak["gb_per_s"]
    for case in result["encode"]:
        # Three tf32 products make one of tf32x3.
        cost = 3 if case["precision"] == "tf32x3" else 1
        name = "ieee" if case["precision"] == "ieee" else "tf32"
        case["share_of_matmul"] = cost * case["tflop_per_s"] / peak[f"{name}_tflop_per_s"]
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA device, and torch finds none here")
    result = json.dumps(main(options), indent=1)
    print(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(result + "\n")
