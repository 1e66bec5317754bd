"""Ours: `harvest` and `train`, with the shards on disk, checkpoints and metrics."""

import shutil
import tempfile
from pathlib import Path

from whole import Whole

from steer_server.dictionary.site import Site
from trainer.allocator import keep_freed_memory
from trainer.config import from_mapping
from trainer.harvest import TOKENS, harvest
from trainer.stop import Stop
from trainer.train import train


def main() -> None:
    # As the command line does.
    keep_freed_memory()
    whole = Whole()
    job = whole.job
    config = from_mapping(
        {
            "model": job["model"],
            "corpus": {"none": 1.0},
            "site": f"resid_post.{job['layer']}",
            "out": "none",
            "tokens": whole.contexts.numel(),
            "architecture": "top_k",
            "n_features": job["n_features"],
            "k": job["k"],
            "batch": job["batch"],
            "context": whole.contexts.shape[1],
            "threads": job["threads"],
            "seed": job["seed"],
        }
    )
    site = Site.parse(config.site)
    with tempfile.TemporaryDirectory() as folder, Stop() as stop:
        shutil.copyfile(job["tokens"], Path(folder) / TOKENS)

        def run() -> int:
            found = harvest(config, [site], Path(folder), stop)[site]
            train([config], found, Path(folder) / "training", stop)
            return found.count // config.batch * config.batch

        whole.run(run)


if __name__ == "__main__":
    main()
