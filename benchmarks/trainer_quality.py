"""How good the trainer's dictionaries are against those of other trainers, of the same activations and as many tokens.

Each library trains in a process of its own, on one file of activations of the two demo corpora, once through, in
batches of the same size, to the same number of features and the same k. What comes of it is taken over as a
`Dictionary`, which must encode and decode as the library's own object does, to 1e-5 of the largest number; and all
are measured by `trainer.evaluate` on held-out text.

A dictionary with a threshold (BatchTopK, Matryoshka) may have another L0 on new text than its k. To be compared at the
same L0, each such dictionary gets the threshold with which the held-out tokens have k active features on average;
`own_l0` is what its own threshold gave there.

Settings are those of `trainer_throughput.py`, with the schedules that the makers recommend: SAELens lets the learning
rate fall in the last fifth; dictionary_learning too, and its warm-up of 1,000 steps and the start of its threshold are
cut to a tenth and a half of so short a training. sparsify's weights are the averaged ones that it saves. Ours has its defaults.

    python benchmarks/trainer_quality.py --environments build/trainers --json build/trainer_quality.json
    python benchmarks/trainer_quality.py --tokens 100000 --libraries steer sparsify
    python benchmarks/trainer_quality.py --libraries steer --add-to build/trainer_quality.json --json build/again.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import circumstances, parser, publish
from safetensors import safe_open
from torch import Tensor, nn
from trainers.activations import write
from trainers.environments import RELEASES, STEER, python, title
from trainers.worker import Worker

from steer_server.dictionary.dictionary import Activation, Dictionary
from steer_server.dictionary.site import Site
from trainer.evaluate import evaluate_together
from trainer.harvest import Activations
from trainer.model import load_model, read_sites
from trainer.stop import Stop

SITE = "resid_post.10"
CORPUS = {"brown.jsonl": 0.8, "sotu.jsonl": 0.2}
CONTESTANTS = (
    (STEER, "top_k"),
    (STEER, "batch_top_k"),
    (STEER, "matryoshka"),
    ("sae_lens", "top_k"),
    ("sae_lens", "batch_top_k"),
    ("sparsify", "top_k"),
    ("dictionary_learning", "top_k"),
    ("dictionary_learning", "batch_top_k"),
)
SKIP_POSITIONS = 1
TOLERANCE = 1e-5


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    corpus = {str(options.corpora / name): share for name, share in CORPUS.items()}
    tokens = (options.tokens, options.eval_tokens)
    found = write(options.activations, options.model, corpus, SITE, tokens, options.threads)
    model = load_model(str(options.model))
    x = _heldout(model, found)
    rows: list[dict[str, Any]] = []
    dictionaries: list[Dictionary] = []
    with tempfile.TemporaryDirectory() as folder, Stop() as stop:
        for library, architecture in CONTESTANTS:
            if library not in options.libraries or architecture not in options.only:
                continue
            path = Path(folder) / f"{library}-{architecture}.safetensors"
            seconds = trained(options, library, architecture, found, path)
            dictionary, own_l0 = _at_k(taken_over(path), options.k, x)
            dictionaries.append(dictionary)
            about = {"library": library, "title": title(library), "architecture": architecture}
            rows.append(about | {"seconds": round(seconds, 1), "own_l0": round(own_l0, 2)})
            print(json.dumps(rows[-1]), flush=True)
        site, bound = Site.parse(SITE), found.max_norm
        qualities = evaluate_together(
            model, site, dictionaries, found.heldout, SKIP_POSITIONS, bound, stop
        )
    rows = [row | asdict(quality) for row, quality in zip(rows, qualities, strict=True)]
    common = {
        "site": SITE,
        "n_features": options.n_features,
        "k": options.k,
        "batch": options.batch,
        "tokens": _steps(options, found) * options.batch,
    }
    if options.add_to:
        rows += _others(json.loads(options.add_to.read_text()), common, options.libraries)
    versions = {"torch": metadata.version("torch")}
    versions |= {n: RELEASES[n].partition("==")[2] for n in options.libraries if n in RELEASES}
    publish(
        options,
        circumstances(options, versions) | common | {"dictionaries": rows},
    )


def _others(
    earlier: dict[str, Any], common: dict[str, Any], libraries: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of an earlier run of other libraries; RuntimeError if it is not of the same training."""
    apart = {name for name, value in common.items() if earlier.get(name) != value}
    if apart:
        raise RuntimeError(f"--add-to has another {', '.join(sorted(apart))}")
    return [row for row in earlier["dictionaries"] if row["library"] not in libraries]


def trained(
    options: argparse.Namespace,
    library: str,
    architecture: str,
    activations: Activations,
    path: Path,
) -> float:
    """Has the library leave a dictionary at `path`; the seconds it took."""
    steps = _steps(options, activations)
    job = {
        "activations": str(options.activations.resolve()),
        "d_model": activations.d_model,
        "architecture": architecture,
        "n_features": options.n_features,
        "k": options.k,
        "alphas": [],
        "batch": options.batch,
        "threads": options.threads,
        "steps": steps,
        "seed": options.seed,
        "out": str(path),
    }
    interpreter = python(library, options.environments)
    worker = Worker(library, f"drive_{library}", interpreter, job, path.with_suffix(".log"))
    try:
        worker.ready()
        began = time.perf_counter()
        # One more than it needs: some loops fetch a batch that they do not use.
        worker.run(steps + 1)
        return time.perf_counter() - began
    finally:
        worker.kill()


def taken_over(path: Path) -> Dictionary:
    """The library's dictionary as ours; RuntimeError if it does not compute the same."""
    with safe_open(path, framework="pt") as file:
        kind = json.loads(file.metadata()["kind"])
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sample = {n: tensors.pop(n) for n in list(tensors) if n.startswith("sample.")}
    kind["activation"] = Activation(kind["activation"])
    dictionary = Dictionary(**tensors, **kind)
    f = dictionary.encode(sample["sample.x"])
    for name, ours in (("f", f), ("x_hat", dictionary.decode(f))):
        theirs = sample[f"sample.{name}"]
        apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if apart > TOLERANCE:
            raise RuntimeError(f"{path.stem}: {name} is {apart:.1e} apart from the library's own")
    return dictionary


def _heldout(model: nn.Module, activations: Activations) -> Tensor:
    """The activations that evaluation looks at."""
    found = []
    for contexts in activations.heldout.split(4):
        (x,) = read_sites(model, [Site.parse(SITE)], contexts)
        keep = x.norm(dim=-1) <= activations.max_norm
        keep[:, :SKIP_POSITIONS] = False
        found.append(x[keep])
    return torch.cat(found)


def _at_k(dictionary: Dictionary, k: int, x: Tensor) -> tuple[Dictionary, float]:
    """The dictionary with k active features a token of `x`, and how many it had."""
    l0 = sum(int(torch.count_nonzero(dictionary.encode(part))) for part in x.split(1024)) / len(x)
    if dictionary.threshold is None:
        return dictionary, l0
    # Without its threshold, so that a lower one can be found as well.
    free = replace(dictionary, threshold=torch.zeros_like(dictionary.threshold))
    values = torch.cat([_largest(free.encode(part), 16 * k) for part in x.split(1024)])
    least = values.topk(k * len(x), sorted=False).values.min()
    # A feature is active above its threshold.
    below = torch.nextafter(least, torch.zeros(()))
    return replace(dictionary, threshold=below.expand(dictionary.n_features).clone()), l0


def _largest(f: Tensor, per_token: int) -> Tensor:
    """The largest activations of some tokens, for memory has no room for all."""
    found = f.flatten()
    return found.topk(min(len(f) * per_token, found.numel()), sorted=False).values


def _steps(options: argparse.Namespace, activations: Activations) -> int:
    return activations.count // options.batch


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=1)
    architectures = sorted({architecture for _, architecture in CONTESTANTS})
    made.add_argument("--only", nargs="+", choices=architectures, default=architectures)
    made.add_argument(
        "--libraries", nargs="+", choices=[STEER, *RELEASES], default=[STEER, *RELEASES]
    )
    made.add_argument("--tokens", type=int, default=1_000_000, help="of both corpora together")
    made.add_argument("--eval-tokens", type=int, default=32_768, help="held out")
    made.add_argument("--n-features", type=int, default=4608)
    made.add_argument("--k", type=int, default=32)
    made.add_argument("--batch", type=int, default=1024, help="a multiple of 256")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--environments", type=Path, default=Path("build/trainers"))
    made.add_argument("--activations", type=Path, default=Path("build/trainer_quality.f32"))
    made.add_argument(
        "--add-to", type=Path, help="an earlier result, of which the other libraries' rows are kept"
    )
    made.add_argument("--corpora", type=Path, default=Path("corpora"))
    options = made.parse_args()
    if options.quick:
        options.tokens, options.eval_tokens = 50_000, 4096
    return options


if __name__ == "__main__":
    main()
