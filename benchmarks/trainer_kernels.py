"""From which density on the trainer's products are faster at full width, on a GPU.

A step's products over the active features are timed in both forms, over densities: `Compressed` by Triton kernels, from
the mask on, and `Dense` by cuBLAS. As in `kernels.py` every case is a CUDA graph, the forms take turns, the L2 cache is
emptied in between, and figures are medians. What the kernels must move at least, entry by entry, is set against a copy;
what the full width multiplies against a square product in the same precision. The density at which both take equally
long is what `CUDA_SHARES` in trainer/active.py should be.

    PYTHONPATH=. python benchmarks/trainer_kernels.py --json build/trainer_kernels.json

Without a CUDA device it says so and ends. `--quick` takes small cases and few rounds, to see that it runs.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from kernels import DEVICE, Clock, Work
from torch import Tensor
from tqdm import tqdm

from trainer.active import CUDA_SHARES, Active, Dense
from trainer.active_cuda import Compressed
from trainer.config import Precision
from trainer.product import product

BYTES = {"float32": 4, "bfloat16": 2}
DENSITIES = [2.0**-n for n in range(11, 2, -1)]


def peaks(clock: Clock) -> dict[str, float]:
    """GB/s of a copy, TFLOP/s of a square product in each precision."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = clock.medians(copy=lambda: target.copy_(source))["copy"]
    result = {"gb_per_s": 2 * source.numel() / 1e6 / copy}
    a, b = torch.randn(2, 1, 8192, 8192, device=DEVICE)
    for precision in CUDA_SHARES:
        took = clock.medians(mm=lambda p=precision: product(a, b, p))["mm"]
        result[f"{precision}_tflop_per_s"] = 2 * 8192**3 / 1e9 / took
    return result


def mask_of(tokens: int, features: int, density: float, everywhere: bool) -> Tensor:
    """Random; with one feature active at every token if `everywhere`."""
    mask = torch.rand(1, tokens, features, device=DEVICE) < density
    if everywhere:
        mask[:, :, 0] = True
    return mask


def all_products(f: Active, g: Tensor, x: Tensor, W: Tensor) -> list[Tensor]:
    """Those of a step after its encoding."""
    pulled = f.pull(g, W)
    return [f.decode(W), pulled.transposed(x), f.transposed(g), pulled.sum_tokens(), f.fired()]


def bench(
    clock: Clock,
    shape: tuple[int, int, int],
    density: float,
    precision: Precision,
    everywhere: bool = False,
) -> dict[str, Any]:
    tokens, features, d = shape
    mask = mask_of(tokens, features, density, everywhere)
    z = torch.randn(1, tokens, features, device=DEVICE)
    W = torch.randn(1, features, d, device=DEVICE) / math.sqrt(d)
    g, x = torch.randn(2, 1, tokens, d, device=DEVICE)
    entries = int(mask.count_nonzero())

    def compressed() -> Compressed:
        return Compressed.at(mask, z, entries, precision)

    def dense() -> Dense:
        return Dense(torch.where(mask, z, 0.0), mask, precision)

    for got, want in zip(
        all_products(compressed(), g, x, W), all_products(dense(), g, x, W), strict=True
    ):
        size = float(want.float().abs().max())
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2 * size)
    f, full = compressed(), dense()
    f.transposed(g)  # orders the entries, which a step does once
    works: dict[str, Work] = {
        "compressed": lambda: all_products(compressed(), g, x, W),
        "dense": lambda: all_products(dense(), g, x, W),
        "build": compressed,
        "decode": lambda: f.decode(W),
        "pull": lambda: f.pull(g, W),
        "transposed": lambda: f.transposed(g),
        "dense_decode": lambda: full.decode(W),
    }
    times = clock.medians(**works)
    moved = entries * (d * BYTES[precision] + 8) + tokens * d * 4
    return {
        "tokens": tokens,
        "features": features,
        "d_model": d,
        "precision": precision,
        "density": density,
        "entries": entries,
        "one_feature_everywhere": everywhere,
        **{f"{name}_ms": value for name, value in times.items()},
        "speedup": times["dense"] / times["compressed"],
        "decode_gb_per_s": moved / 1e6 / times["decode"],
        "dense_decode_tflop_per_s": 2 * tokens * features * d / 1e9 / times["dense_decode"],
    }


def switch_over(cases: Sequence[dict[str, Any]]) -> float | None:
    """The density at which both forms take equally long, by interpolation; none if one always wins."""
    for low, high in pairwise(cases):
        if low["speedup"] >= 1 > high["speedup"]:
            above, below = math.log(low["speedup"]), math.log(high["speedup"])
            part = above / (above - below)
            return low["density"] * (high["density"] / low["density"]) ** part
    return None


def main(options: argparse.Namespace) -> dict[str, Any]:
    clock = Clock(5 if options.quick else options.rounds)
    shapes = [(512, 2048, 256)] if options.quick else [(4096, 16384, 1024), (4096, 32768, 4096)]
    peak = peaks(clock)
    cases, switch = [], []
    for shape in shapes:
        for precision in CUDA_SHARES:
            label = f"{shape} {precision}"
            found = [bench(clock, shape, d, precision) for d in tqdm(DENSITIES, desc=label)]
            switch.append(
                {
                    "shape": shape,
                    "precision": precision,
                    "measured": switch_over(found),
                    "in_use": CUDA_SHARES[precision],
                }
            )
            cases += [*found, bench(clock, shape, DENSITIES[2], precision, everywhere=True)]
            torch.cuda.empty_cache()
    for case in cases:
        flops = peak[f"{case['precision']}_tflop_per_s"]
        case["decode_share_of_copy"] = case["decode_gb_per_s"] / peak["gb_per_s"]
        case["dense_share_of_matmul"] = case["dense_decode_tflop_per_s"] / flops
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "rounds": clock.rounds,
        "roofline": peak,
        "switch_over": switch,
        "cases": cases,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    options = _options()
    if torch.cuda.is_available():
        result = json.dumps(main(options), indent=1)
        print(result)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(result + "\n")
    else:
        print("torch finds no CUDA device here: nothing is measured")
