"""How a process finds its place among those that torchrun started with it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config import BASELINES, TrainConfig
from trainer.errors import BadConfig
from trainer.ranks import ALONE, Ranks, reaching_all
from trainer.top_k import prefixes


@contextmanager
def joined(configs: Sequence[TrainConfig], runs: Path) -> Iterator[Ranks]:
    """This process's rank, by torchrun's environment; alone without one. BadConfig if they cannot divide the work.

    On a machine with GPUs each process takes that of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = Ranks(int(os.environ["RANK"]), size, configs[0].parallel, here)
    check(configs, size)
    gpus = torch.cuda.device_count()
    if gpus:
        local = int(os.environ["LOCAL_RANK"])
        if local >= gpus:
            raise BadConfig(f"process {local} of this machine has no GPU; --nproc-per-node={gpus}")
        torch.cuda.set_device(local)
    with reaching_all():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    try:
        _check_shared(ranks, runs)
        yield ranks
    finally:
        dist.destroy_process_group()


def check(configs: Sequence[TrainConfig], size: int) -> None:
    """BadConfig if `size` ranks cannot divide what `parallel` says."""
    if configs[0].parallel == "members":
        if len(configs) < size:
            raise BadConfig(
                f"{size} processes cannot divide {len(configs)} dictionaries among them; start fewer, or set "
                "parallel to data or features"
            )
        return
    for config in configs:
        if config.architecture in BASELINES:
            continue
        name = "batch" if config.parallel == "data" else "n_features"
        if getattr(config, name) % size:
            raise BadConfig(
                f"{name} is {getattr(config, name)}; with parallel = {config.parallel!r} it must be a multiple of "
                f"the number of processes, {size}"
            )
        if config.parallel == "features" and config.resample_every:
            raise BadConfig(
                f"resample_every is {config.resample_every}; with parallel = 'features' no process has a whole dictionary "
                "to see what it misses, so it must be 0"
            )
        if config.parallel == "features" and config.architecture == "matryoshka":
            ends = prefixes(config.n_features, config.prefixes)
            least = min(last - first for first, last in zip((0, *ends), ends, strict=False))
            if least < size:
                raise BadConfig(
                    f"prefixes of {ends} features add as few as {least}; with parallel = 'features' each must add one "
                    f"on each of {size} processes"
                )


def _check_shared(ranks: Ranks, runs: Path) -> None:
    """BadConfig if a rank does not see what the first one writes."""
    seen = runs / f".ranks-{os.environ['MASTER_PORT']}"
    if ranks.first:
        runs.mkdir(parents=True, exist_ok=True)
        seen.touch()
    ranks.meet()
    missing = ranks.any(not seen.exists())
    if ranks.first:
        seen.unlink()
    if missing:
        raise BadConfig(
            f"--runs {runs} is not the same folder for all processes; name one that all machines share"
        )
