"""The activations that all libraries train on: a raw file of float32, which each can map into memory."""

from collections.abc import Mapping
from pathlib import Path

import torch

from steer_server.dictionary.site import Site
from trainer.config import from_mapping
from trainer.files import whole_file
from trainer.harvest import Activations, harvest
from trainer.stop import Stop


def write(
    path: Path,
    model: Path,
    corpus: Mapping[str, float],
    site: str,
    tokens: tuple[int, int],
    threads: int,
) -> Activations:
    """The harvest, copied to `path` if it is not there yet; itself it stays beside the file.

    `tokens` are those of training and those held out.
    """
    torch.set_num_threads(threads)
    config = from_mapping(
        {
            "model": str(model),
            "site": site,
            "corpus": corpus,
            "out": "none",
            "tokens": tokens[0],
            "eval_tokens": tokens[1],
            "n_features": 1,
            "architecture": "relu",
            "activation_dtype": "float32",
            "threads": threads,
        }
    )
    where = Site.parse(site)
    with Stop() as stop:
        folder = path.with_suffix(f".{config.harvest_digest}")
        found = harvest(config, [where], folder, stop)[where]
    if not path.exists() or path.stat().st_size != 4 * found.count * found.d_model:
        with whole_file(path) as fresh, fresh.open("wb") as file:
            for shard in found.shards:
                file.write(shard.numpy().tobytes())
    return found
