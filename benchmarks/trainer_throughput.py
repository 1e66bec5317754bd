"""How fast the trainer is against other trainers of sparse dictionaries, on the same activations of a real model.

Each library is a process of its own with its own loop in it (`SAETrainer.fit` and `MultiSAETrainer.fit` of SAELens,
`Trainer.fit` of sparsify, `trainSAE` of dictionary_learning, `train` of ours), which gets its batches from one file
of activations. The processes take turns: in every round each makes a few steps while all others sleep. Ratios are
taken within a round; a table has their medians, the JSON their ranges as well.

    top_k, batch_top_k   one dictionary of 4,608 features, k = 32
    wide                 one of 16,384 features, k = 32
    sweep                the paper's 16 dictionaries of 1,152 features, L1 from 1e-4 to 1e-2, in one pass

All of them: the model's resid_post.10, width 576, batches of 2,048, float32 without autocast, the same number of threads,
the same release of torch, no logging. Of the rest, each library has what its makers recommend:

    steer                defaults; checkpoints and metrics as always; its process, and those of bare products, keep freed
                         memory, as `python -m trainer` does
    SAELens              lr 3e-4, activations scaled by expected_average_only_in; top_k twice, as by default and with
                         use_sparse_activations, which on a CPU needs rescale_acts_by_decoder_norm = False
    sparsify             defaults: signum with schedule-free momentum, FVU loss; has neither BatchTopK nor L1
    dictionary_learning  defaults, normalize_activations; its April update of the L1 dictionary

AuxK is on where the library has it on, but no run is long enough for a feature to count as dead. In the sweep all have
Adam at 1e-3 without warm-up, and alphas mean the same in all. A step there costs us less the fewer features are active,
which takes training: there `--warmup` steps come first and are not counted, elsewhere four at most.

    python benchmarks/trainer_throughput.py --json build/trainer_throughput.json
    python benchmarks/trainer_throughput.py --only top_k --libraries steer sparsify --quick

Environments are made in `--environments`, which takes minutes and some 5 GB the first time.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common import circumstances, parser, publish
from tqdm import tqdm
from trainers.environments import RELEASES, STEER, python, title
from trainers.worker import Worker

D_MODEL, BATCH, SITE, TOKENS = 576, 2048, "resid_post.10", (131_072, 1024)
TORCH = "torch"
"""Stands in the place of a library for products alone."""
LIBRARIES = [STEER, *RELEASES, TORCH]
ALPHAS = [10 ** (-4 + 2 * number / 15) for number in range(16)]
_FIRST = 4
"""Steps in which a process makes what it keeps."""
MANY_STEPS = 100_000
"""What schedules are told; no process gets so far."""


@dataclass(frozen=True)
class Contestant:
    """A library's loop with one of its architectures."""

    library: str
    architecture: str
    variant: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.library, self.variant)))


@dataclass(frozen=True)
class Case:
    n_features: int
    contestants: tuple[Contestant, ...]
    """The first is the one the others are compared with."""
    k: int = 32
    alphas: Sequence[float] = ()

    @property
    def dictionaries(self) -> int:
        return len(self.alphas) or 1


_TOP_K = (
    Contestant(STEER, "top_k"),
    Contestant("sae_lens", "top_k"),
    Contestant("sae_lens", "top_k sparse", "sparse"),
    Contestant("sparsify", "top_k"),
    Contestant("dictionary_learning", "top_k"),
)
CASES = {
    "top_k": Case(4608, _TOP_K),
    "batch_top_k": Case(
        4608,
        tuple(
            Contestant(name, "batch_top_k") for name in (STEER, "sae_lens", "dictionary_learning")
        ),
    ),
    "wide": Case(16384, _TOP_K),
    "sweep": Case(
        1152,
        (
            Contestant(STEER, "relu"),
            Contestant(STEER, "tied_relu", "tied"),
            Contestant("sae_lens", "relu"),
            Contestant("dictionary_learning", "relu"),
        ),
        k=0,
        alphas=ALPHAS,
    ),
}
PRODUCTS = tuple(
    Contestant(TORCH, kind, kind) for kind in ("encode", "encode oneDNN", "square", "square oneDNN")
)


def main() -> None:
    options = _options()
    found = {name: measured(options, name, CASES[name]) for name in options.only}
    versions = {"torch": metadata.version("torch")}
    versions |= {
        name: RELEASES[name].partition("==")[2] for name in options.libraries if name in RELEASES
    }
    result = circumstances(options, versions) | {
        "threads": options.threads,
        "batch": options.batch,
        "rounds": options.rounds,
        "steps": options.steps,
        "warmup": options.warmup,
        "cases": found,
    }
    publish(options, result)


def measured(options: argparse.Namespace, name: str, case: Case) -> dict[str, Any]:
    """What each contestant took, and how that compares."""
    contestants = [c for c in (*case.contestants, *PRODUCTS) if c.library in options.libraries]
    with tempfile.TemporaryDirectory() as logs:
        workers: list[Worker] = []
        try:
            for contestant in contestants:
                workers.append(_start(options, case, contestant, Path(logs)))
            rounds = _rounds(options, name, workers)
        finally:
            for worker in workers:
                worker.kill()
    return {
        "n_features": options.n_features or case.n_features,
        "k": case.k,
        "dictionaries": case.dictionaries,
        "load": os.getloadavg()[0],
        "contestants": {
            contestant.name: _summary(case, contestant, rounds, number)
            for number, contestant in enumerate(contestants)
        },
    }


def _start(options: argparse.Namespace, case: Case, contestant: Contestant, logs: Path) -> Worker:
    """A process that is warm: its first steps are done."""
    job = {
        "activations": str(options.activations.resolve()),
        "d_model": D_MODEL,
        "architecture": contestant.architecture,
        "n_features": options.n_features or case.n_features,
        "k": case.k,
        "alphas": list(case.alphas),
        "batch": options.batch,
        "threads": options.threads,
        "steps": MANY_STEPS,
        "seed": 0,
        "out": "",
    }
    library = STEER if contestant.library == TORCH else contestant.library
    interpreter = python(library, options.environments)
    driver = "products" if contestant.library == TORCH else contestant.library
    log = logs / f"{contestant.name}.log"
    worker = Worker(contestant.name, f"drive_{driver}", interpreter, job, log)
    worker.ready()
    worker.run(options.warmup if case.alphas else min(options.warmup, _FIRST))
    return worker


def _rounds(
    options: argparse.Namespace, name: str, workers: Sequence[Worker]
) -> list[list[dict[str, Any]]]:
    """By round, each worker's answer; one runs at a time."""
    found = []
    with tqdm(desc=name, total=options.rounds * len(workers), unit=" runs") as bar:
        for _ in range(options.rounds):
            answers = []
            for worker in workers:
                bar.set_postfix_str(worker.name)
                answers.append(worker.run(options.steps))
                bar.update()
            found.append(answers)
    return found


def _summary(
    case: Case, contestant: Contestant, rounds: Sequence[Sequence[dict[str, Any]]], number: int
) -> dict[str, Any]:
    """Medians over rounds; a ratio is how many times as long as the first contestant of the round."""
    seconds = [answers[number]["seconds"] / answers[number]["steps"] for answers in rounds]
    cpu = [answers[number]["cpu_seconds"] / answers[number]["steps"] for answers in rounds]
    median = statistics.median(seconds)
    summary = {
        "title": contestant.library if contestant.library == TORCH else title(contestant.library),
        "architecture": contestant.architecture,
        "ms": round(1000 * median, 2),
        "cpu_ms": round(1000 * statistics.median(cpu), 2),
        "ratio": _ratio(rounds, number, "seconds"),
        "cpu_ratio": _ratio(rounds, number, "cpu_seconds"),
    }
    if contestant.library == TORCH:
        return summary | {"gflop_per_second": round(rounds[0][number]["flop"] / median / 1e9, 1)}
    tokens = rounds[0][number]["tokens"] * case.dictionaries
    return summary | {"dictionary_tokens_per_second": round(tokens / median)}


def _ratio(rounds: Sequence[Sequence[dict[str, Any]]], number: int, key: str) -> dict[str, float]:
    ratios = [answers[number][key] / answers[0][key] for answers in rounds]
    found = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: round(value, 3) for name, value in found.items()}


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=7)
    made.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    made.add_argument("--steps", type=int, default=8, help="of each contestant in a round")
    made.add_argument("--warmup", type=int, default=100, help="steps before the first round")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--batch", type=int, default=BATCH)
    made.add_argument("--n-features", type=int, help="instead of each case's own")
    made.add_argument(
        "--environments", type=Path, default=Path("build/trainers"), help="of the other libraries"
    )
    made.add_argument(
        "--activations",
        type=Path,
        default=Path("build/trainer_activations.f32"),
        help="raw float32; harvested if it is not there",
    )
    made.add_argument("--corpus", type=Path, default=Path("corpora/brown.jsonl"))
    options = made.parse_args()
    if options.quick:
        options.rounds, options.steps, options.warmup = 2, 2, 2
    if not options.activations.exists():
        from trainers.activations import write

        corpus = {str(options.corpus): 1.0}
        write(options.activations, options.model, corpus, SITE, TOKENS, options.threads)
    return options


if __name__ == "__main__":
    main()
