"""What a step of our trainer is made of, and how far it is from the least it could take.

The cases are those of trainer_throughput.py, on the same activations. A step's flop are counted: every member has the
encoder's product, 2 F D for each token; beyond it those whose features are active on more than a tenth of all places
have four more products of full width, the others 8 D for each active feature. `floor_ms` is the time of those products
at the machine's peak, which is that of a square product of 2,048; what a step takes in `products` at full width, in
`sparse` ones over active features, and in all `rest` (passes over activations, the optimiser, choosing the active),
says torch's profiler.

`ideal_ratio` is how many times as long as that floor a step would take whose products are all of full width, five for each
member, at the same peak: so much faster than a trainer that makes them all, without anything else to do, a step can be.

    python benchmarks/trainer_profile.py --json build/trainer_profile.json
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import circumstances, parser, publish
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from trainer_throughput import CASES, D_MODEL, MANY_STEPS, Case

from steer_server.dictionary.linear import linear
from trainer.active import SPARSE_SHARE
from trainer.allocator import keep_freed_memory
from trainer.config import from_mapping
from trainer.stack import Stack

_PRODUCTS = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_SPARSE = ("aten::_embedding_bag_forward_only", "aten::sparse_sampled_addmm")
_SQUARE = 2048


def main() -> None:
    options = _options()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    rows = np.memmap(options.activations, dtype=np.float32, mode="c").reshape(-1, D_MODEL)
    x = torch.from_numpy(rows)
    # As a training scales them: E|x|^2 = d_model.
    x = x * (D_MODEL / x.square().sum(dim=1).mean()).sqrt()
    with torch.inference_mode():
        peak = _peak(options.rounds)
    with torch.no_grad():
        found = {name: measured(options, name, CASES[name], x, peak) for name in options.only}
    versions = {"torch": torch.__version__}
    result = circumstances(options, versions) | {
        "threads": options.threads,
        "batch": options.batch,
        "peak_gflop_per_second": round(peak / 1e9, 1),
        "cases": found,
    }
    publish(options, result)


def measured(
    options: argparse.Namespace, name: str, case: Case, x: Tensor, peak: float
) -> dict[str, Any]:
    """A step's time, its parts and its floor, after `warmup` steps of a sweep."""
    stack = Stack(_configs(options, case, len(x)), x.mean(dim=0), MANY_STEPS)
    batches = x[: len(x) // options.batch * options.batch].split(options.batch)
    warmup = options.warmup if case.alphas else min(options.warmup, 4)
    seconds = []
    outcome = None
    for number in tqdm(range(warmup + options.rounds), desc=name, unit=" steps"):
        began = time.perf_counter()
        outcome = stack.advance(batches[number % len(batches)])
        seconds.append(time.perf_counter() - began)
    assert outcome is not None
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        stack.advance(batches[0])
    parts = {"products": 0.0, "sparse": 0.0, "rest": 0.0}
    for event in seen.key_averages():
        kind = (
            "products" if event.key in _PRODUCTS else "sparse" if event.key in _SPARSE else "rest"
        )
        parts[kind] += event.self_cpu_time_total / 1000
    n_features = stack.configs[0].n_features
    product = 2 * options.batch * n_features * D_MODEL
    active = outcome.l0.tolist()
    dense = [l0 > SPARSE_SHARE * n_features for l0 in active]
    over_active = sum(
        8 * D_MODEL * options.batch * l0 for l0, full in zip(active, dense, strict=True) if not full
    )
    floor = (product * (len(active) + 4 * sum(dense)) + over_active) / peak
    median = statistics.median(seconds[warmup:])
    return {
        "l0": [round(l0, 1) for l0 in active],
        "dense_members": sum(dense),
        "ms": round(1000 * median, 1),
        "floor_ms": round(1000 * floor, 1),
        "parts_ms": {kind: round(ms, 1) for kind, ms in parts.items()},
        "ideal_ratio": round(5 * len(active) * product / peak / floor, 2),
    }


def _configs(options: argparse.Namespace, case: Case, tokens: int) -> list[Any]:
    keys = {
        "model": "none",
        "corpus": {"none": 1.0},
        "site": "resid_post.0",
        "tokens": tokens,
        "architecture": case.contestants[0].architecture,
        "n_features": case.n_features,
        "k": case.k,
        "batch": options.batch,
        "threads": options.threads,
        "dead_after": 10_000_000,
    }
    if case.alphas:
        keys |= {"loss_reduction": "mean", "lr": 1e-3}
    return [
        from_mapping(keys | {"alpha": alpha, "out": f"none/{number}"})
        for number, alpha in enumerate(case.alphas or [0.0])
    ]


def _peak(rounds: int) -> float:
    """FLOP/s of a large square product, by the faster of torch's two."""
    a, b = torch.rand(_SQUARE, _SQUARE), torch.rand(_SQUARE, _SQUARE)
    best = float("inf")
    for product in (linear, torch.nn.functional.linear):
        seconds = []
        for _ in range(max(3, rounds)):
            began = time.perf_counter()
            product(a, b)
            seconds.append(time.perf_counter() - began)
        best = min(best, statistics.median(seconds))
    return 2 * _SQUARE**3 / best


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=10)
    made.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument(
        "--warmup", type=int, default=100, help="steps of the sweep before it is timed"
    )
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--batch", type=int, default=2048)
    made.add_argument(
        "--activations",
        type=Path,
        default=Path("build/trainer_activations.f32"),
        help="of trainer_throughput.py, which makes them",
    )
    options = made.parse_args()
    if options.quick:
        options.rounds, options.warmup = 2, 2
    if not options.activations.exists():
        made.error(f"{options.activations} is not there: run trainer_throughput.py first")
    return options


if __name__ == "__main__":
    main()
