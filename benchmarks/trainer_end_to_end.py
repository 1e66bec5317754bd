"""How long other trainers take from token ids to a dictionary, the model included, as multiples of ours.

Every run is a process of its own that loads its library and the model, and is timed from then on: the model runs over
the contexts, and a TopK dictionary of 4,608 features, k = 32, is trained on what it computes at resid_post.10, once through.
Contexts of 256 tokens of the demo corpora, batches of 2,048, the model in its own dtype, weights of the dictionary in
float32, the same release of torch and as many threads. Runs are interleaved; ratios are taken within a round.

    steer                `harvest`, activations on disk, and `train`
    SAELens              `LanguageModelSAETrainingRunner`, the model by AutoModelForCausalLM
    sparsify             `Trainer.fit`, in a hook of a model without its head
    dictionary_learning  `trainSAE` on an `ActivationBuffer` of nnsight

The two with a buffer in memory have one of two batches, so that not much is left in it at the end; how their scale is
estimated is cut to a batch or none.

    python benchmarks/trainer_end_to_end.py --json build/trainer_end_to_end.json
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common import circumstances, parser, publish
from safetensors.torch import save_file
from tqdm import tqdm
from trainers.environments import RELEASES, STEER, python, title
from trainers.worker import Worker
from transformers import AutoConfig

from trainer.config import from_mapping
from trainer.model import load_tokenizer, shape_of
from trainer.stop import Stop
from trainer.tokens import pack

CORPUS = {"brown.jsonl": 0.8, "sotu.jsonl": 0.2}
LIBRARIES = [STEER, *RELEASES]


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        tokens = _tokens(options, Path(folder))
        rounds: list[dict[str, dict[str, Any]]] = []
        with tqdm(total=options.rounds * len(options.libraries), unit=" runs") as bar:
            for _ in range(options.rounds):
                rounds.append({})
                for library in options.libraries:
                    bar.set_postfix_str(library)
                    rounds[-1][library] = _run(options, library, tokens, Path(folder))
                    bar.update()
    versions = {"torch": metadata.version("torch")}
    versions |= {n: RELEASES[n].partition("==")[2] for n in options.libraries if n in RELEASES}
    publish(
        options,
        circumstances(options, versions)
        | {
            "threads": options.threads,
            "batch": options.batch,
            "tokens": options.tokens,
            "rounds": options.rounds,
            "contestants": {
                title(library): _summary(rounds, library) for library in options.libraries
            },
        },
    )


def _tokens(options: argparse.Namespace, folder: Path) -> Path:
    """A file of contexts, as `harvest` keeps them."""
    config = from_mapping(
        {
            "model": str(options.model),
            "site": f"resid_post.{options.layer}",
            "corpus": {str(options.corpora / name): share for name, share in CORPUS.items()},
            "out": "none",
            # What does not fill a context is left out of each corpus.
            "tokens": options.tokens + 2 * options.context,
            "eval_tokens": 2 * options.context,
            "n_features": 1,
            "architecture": "relu",
            "context": options.context,
        }
    )
    with Stop() as stop:
        packed = pack(config, load_tokenizer(config.model), stop)
    packed["train"] = packed["train"][: options.tokens // options.context].contiguous()
    path = folder / "tokens.safetensors"
    save_file(packed, path)
    return path


def _run(options: argparse.Namespace, library: str, tokens: Path, folder: Path) -> dict[str, Any]:
    job = {
        "model": str(options.model.resolve()),
        "tokens": str(tokens),
        "layer": options.layer,
        "dtype": str(AutoConfig.from_pretrained(options.model).dtype).removeprefix("torch."),
        "d_model": shape_of(str(options.model))["hidden_size"],
        "n_features": options.n_features,
        "k": 32,
        "batch": options.batch,
        "threads": options.threads,
        "seed": 0,
    }
    interpreter = python(library, options.environments)
    worker = Worker(library, f"whole_{library}", interpreter, job, folder / f"{library}.log")
    try:
        worker.ready()
        return worker.run(0)
    finally:
        worker.kill()


def _summary(rounds: Sequence[dict[str, dict[str, Any]]], library: str) -> dict[str, Any]:
    """Medians over rounds; a ratio is how many times as long as ours a token takes in the same round."""
    per_token = [found[library]["seconds"] / found[library]["tokens"] for found in rounds]
    summary = {
        "seconds": round(statistics.median(found[library]["seconds"] for found in rounds), 1),
        "tokens_per_second": round(1 / statistics.median(per_token), 1),
    }
    if STEER not in rounds[0]:
        return summary
    ratios = [
        own / (found[STEER]["seconds"] / found[STEER]["tokens"])
        for own, found in zip(per_token, rounds, strict=True)
    ]
    found = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return summary | {"ratio": {name: round(value, 2) for name, value in found.items()}}


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "", rounds=3)
    made.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    made.add_argument("--tokens", type=int, default=32_768)
    made.add_argument("--layer", type=int, default=10)
    made.add_argument("--n-features", type=int, default=4608)
    made.add_argument("--batch", type=int, default=2048)
    made.add_argument("--context", type=int, default=256)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--environments", type=Path, default=Path("build/trainers"))
    made.add_argument("--corpora", type=Path, default=Path("corpora"))
    options = made.parse_args()
    if options.quick:
        options.rounds, options.tokens = 1, options.tokens // 4
    return options


if __name__ == "__main__":
    main()
