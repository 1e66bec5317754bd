"""What the tests of several ranks run: `python -m tests.unit.rank_runs FOLDER` is two of them, which fill the folder.

They are forked with the environment that torchrun would give them, so that the imports cost their seconds once.
"""

import json
import multiprocessing
import os
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from steer_server.dictionary.site import Site
from trainer import harvest
from trainer.architectures import ARCHITECTURES
from trainer.checkpoint import CHECKPOINT, PARTS, save, whole_parameters
from trainer.config import TrainConfig, from_mapping
from trainer.errors import Interrupted
from trainer.harvest import Activations
from trainer.launch import joined
from trainer.ranks import Ranks
from trainer.run import run
from trainer.stack import Stack
from trainer.stop import Stop
from trainer.top_k import TopK
from trainer.train import METRICS, train

D, BATCH, STEPS, STOPPED_AT = 16, 32, 8, 5
MODES = ("data", "features")


def configs_of(config: TrainConfig, name: str) -> list[TrainConfig]:
    """Two dictionaries of that architecture; features die soon, so that AuxK has work, and gradients are clipped."""
    found = []
    for member in range(2):
        by_k = isinstance(ARCHITECTURES[name], TopK)
        change = {
            "architecture": name,
            "n_features": 64,
            "k": 2 + member if by_k else 0,
            "alpha": 0.0 if by_k else 0.02 * (member + 1),
            "loss_reduction": "mean" if name == "tied_relu" else "sum",
            "lr": 3e-3,
            "clip": 0.5,
            "dead_after": 1,
            "aux_k": 5,
            "prefixes": (0.25, 0.5),
            "batch": BATCH,
            "seed": member,
            "out": f"{name}-{member}",
        }
        found.append(replace(config, **change))
    return found


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, D, generator=generator) for _ in range(STEPS)]


def steps(config: TrainConfig, name: str, folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """What every step says of that architecture, and its parameters in the end."""
    stack = Stack(configs_of(config, name), torch.full((D,), 0.1), STEPS, ranks)
    said = []
    with torch.no_grad():
        for x in batches():
            outcome = stack.advance(ranks.own_tokens(x))
            said.append([outcome.loss, outcome.l0, outcome.fvu, stack.dead_share()])
    folder.mkdir(parents=True, exist_ok=True)
    save([stack], STEPS, folder, ranks)
    (parameters,) = whole_parameters([stack], folder, ranks) if ranks.first else [{}]
    reports = torch.stack([torch.stack(row) for row in said])
    return {f"p.{key}": value for key, value in parameters.items()} | {"said": reports}


def activations(config: TrainConfig) -> Activations:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(STEPS * BATCH, D, generator=generator)
    nothing = torch.zeros(0, dtype=torch.int32)
    return Activations([x], [nothing], nothing, nothing, 1e9, Site.parse(config.site))


def everything(config: TrainConfig) -> list[TrainConfig]:
    return [one for name in ARCHITECTURES for one in configs_of(config, name)[:1]]


def kept(folder: Path) -> dict[str, bytes]:
    """The bytes of a training's checkpoint and metrics."""
    names = [CHECKPOINT, PARTS, METRICS]
    parts = json.loads((folder / PARTS).read_text())["files"] if (folder / PARTS).exists() else []
    paths = [folder / name for name in (*names, *parts)]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def broken_off(config: TrainConfig, folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Whether a training that the last rank's signal broke off ends in the same bytes as one that was not."""
    same = {}
    configs = everything(config)
    whole = train(configs, activations(config), folder / "unbroken", Stop(), ranks=ranks)
    stop, seen = Stop(), []

    def on_step(step: int) -> None:
        seen.append(step)
        stop.requested = step == STOPPED_AT and ranks.rank == ranks.size - 1

    try:
        train(configs, activations(config), folder / "broken", stop, on_step, ranks)
    except Interrupted:
        same["stopped"] = torch.tensor(seen[-1] == STOPPED_AT)
    left = sorted(path.name for path in (folder / "broken").glob("checkpoint*"))
    resumed = train(configs, activations(config), folder / "broken", Stop(), ranks=ranks)
    ranks.meet()
    same["bytes"] = torch.tensor(kept(folder / "broken") == kept(folder / "unbroken"))
    same["parts"] = torch.tensor(len(left) == (1 if ranks.parallel == "data" else ranks.size + 1))
    pairs = zip(whole, resumed, strict=True)
    same["weights"] = torch.tensor(all(torch.equal(a.W_dec, b.W_dec) for a, b in pairs))
    return same


def resampled(config: TrainConfig, ranks: Ranks) -> dict[str, Tensor]:
    """All ranks' rows and moments, after steps of which some made dead features begin anew."""
    configs = [replace(one, resample_every=2) for one in configs_of(config, "relu")]
    stack = Stack(configs, torch.full((D,), 0.1), STEPS, ranks)
    stack.parameters["b_enc"][:, ::2] = -1e3
    with torch.no_grad():
        for x in batches():
            stack.advance(ranks.own_tokens(x))
    return {name: ranks._gather(value) for name, value in stack.tensors().items()}


def selection(ranks: Ranks) -> dict[str, Tensor]:
    """The exact n-th largest and the exact places, with ties, for a guess too low, close and too high."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randint(-40, 40, (2, 30, 12), generator=generator).float()
    own = z.chunk(ranks.size, dim=1)[ranks.rank]
    found = {
        f"nth {guess}": ranks.nth_largest(own, [60, 7], torch.full((2,), guess))
        for guess in (-99.0, 20.0, 38.0)
    }
    split = replace(ranks, parallel="features")
    features = z[:, :, ranks.rank :: ranks.size]
    best = features.topk(5 - ranks.rank, dim=2).values
    chosen = (split.places(best) < 4).sum(dim=2)
    lowest = torch.where(split.places(best) < 4, best, 99.0).amin(dim=2)
    total = split.over_features(chosen.float())
    return found | {"chosen": total, "lowest": -(-split._gather(lowest)).amax(dim=0), "z": z}


def one_rank(folder: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    config = from_mapping(json.loads((folder / "config.json").read_text()))
    with joined([config], folder / "runs") as ranks:
        for mode in MODES:
            several = replace(ranks, parallel=mode)
            for name in ARCHITECTURES:
                found = steps(config, name, folder / mode / name, several)
                keep(found, folder / f"{mode}-{name}.safetensors", ranks)
            found = broken_off(config, folder / mode, several)
            save_file(found, folder / f"{mode}-broken-{ranks.rank}.safetensors")
        keep(resampled(config, ranks), folder / "resampled.safetensors", ranks)
        keep(selection(ranks), folder / "selection.safetensors", ranks)
        harvest.SHARD_CONTEXTS = 16
        members = replace(ranks, parallel="members")
        run(members_of(config, folder / "members"), folder / "runs", Stop(), members)


def main(folder: Path, size: int = 2) -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in map(str, range(size)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(size)}
        master = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        processes.append(context.Process(target=one_rank, args=(folder, ranks | master)))
        processes[-1].start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


def members_of(config: TrainConfig, out: Path) -> list[TrainConfig]:
    """Four dictionaries of one stack."""
    return [
        replace(config, parallel="members", seed=seed, out=str(out / str(seed)))
        for seed in range(4)
    ]


def keep(tensors: dict[str, Tensor], path: Path, ranks: Ranks) -> None:
    if ranks.first:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def write_config(config: TrainConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(config)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
