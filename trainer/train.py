"""Training: many dictionaries in one pass over the harvested activations, to be broken off and continued at any step."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from trainer.architectures import Outcome
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig, TrainerError
from trainer.files import whole_file
from trainer.harvest import Activations
from trainer.model import device
from trainer.stack import Stack, stacks
from trainer.stop import Stop

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
CHECKPOINT_EVERY, METRICS_EVERY = 250, 50
_SCALE_SHARDS = 16


def train(
    configs: Sequence[TrainConfig],
    activations: Activations,
    folder: Path,
    stop: Stop,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Dictionary]:
    """The dictionaries after `epochs`, in the order of `configs`, going on from the checkpoint in `folder` if there is one.

    The configurations have everything in common but what a stack may differ in (`stacks`). The result has the same
    bytes however often training was broken off, for equal `threads`. `on_step` is told the number of each finished step.
    """
    config, path = configs[0], folder / CHECKPOINT
    scale, mean = _scale_and_mean(activations, config.normalise_input)
    per_epoch = activations.count // config.batch
    if not per_epoch:
        raise BadConfig(f"{activations.count} activations do not fill a batch of {config.batch}")
    total = per_epoch * config.epochs
    groups = [Stack(members, mean * scale, total) for members in stacks(configs)]
    step = _restore(groups, path) if path.exists() else 0
    order = epoch_order(config, activations.count, step // per_epoch)
    folder.mkdir(parents=True, exist_ok=True)
    _forget_metrics(folder / METRICS, step)
    with (
        tqdm(desc="train", total=total, initial=step, unit=" steps") as bar,
        (folder / METRICS).open("a", encoding="utf-8") as metrics,
    ):
        while step < total:
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = epoch_order(config, activations.count, epoch)
            index = order[place * config.batch :][: config.batch]
            x = activations.gather(index) * scale
            if not x.isfinite().all():
                raise TrainerError(
                    f"an activation among those of step {step} is not finite; remove the harvest and run again"
                )
            with torch.no_grad():
                outcomes = [group.advance(x.to(device())) for group in groups]
            step += 1
            bar.update()
            # Numbers of a GPU are worth waiting for now and then only.
            if device().type == "cpu" or step % METRICS_EVERY == 0 or step == total:
                _show(bar, groups, outcomes)
            if step % METRICS_EVERY == 0 or step == total:
                _write_metrics(metrics, step, groups, outcomes)
            on_step(step)
            if stop.requested or step % CHECKPOINT_EVERY == 0 or step == total:
                _save(groups, step, path)
            if step < total:
                stop.check(f"step {step} of {total} is saved in {path}")
    made: dict[int, Dictionary] = {}
    for group in groups:
        made |= zip(map(id, group.configs), group.dictionaries(scale), strict=True)
    return [made[id(config)] for config in configs]


def epoch_order(config: TrainConfig, count: int, epoch: int) -> Tensor:
    """The random order of all activations in that epoch."""
    generator = torch.Generator().manual_seed(config.data_seed + 1 + 1_000_003 * epoch)
    return torch.randperm(count, generator=generator)


def _scale_and_mean(activations: Activations, normalise: bool) -> tuple[float, Tensor]:
    """s with E|s x|^2 = d_model, or 1, and E x, over shards spread evenly through the harvest."""
    stride = -(-len(activations.shards) // _SCALE_SHARDS)
    chosen = activations.shards[::stride]
    rows = sum(len(shard) for shard in chosen)
    squares = sum(shard.double().square().sum().item() for shard in chosen)
    mean = torch.stack([shard.double().sum(dim=0) for shard in chosen]).sum(dim=0) / rows
    scale = math.sqrt(activations.d_model * rows / squares) if normalise else 1.0
    return scale, mean.float()


def _show(bar: tqdm, groups: Sequence[Stack], outcomes: Sequence[Outcome]) -> None:
    """The range over all dictionaries."""
    shares = [(group.quiet >= group.configs[0].dead_after).float().mean(dim=1) for group in groups]
    columns = {
        "L0": torch.cat([outcome.l0 for outcome in outcomes]),
        "FVU": torch.cat([outcome.fvu for outcome in outcomes]),
        "dead": torch.cat(shares),
    }
    shown = {name: _range(values) for name, values in columns.items()}
    bar.set_postfix(shown, refresh=False)


def _range(values: Tensor) -> str:
    least, most = f"{values.min():.3g}", f"{values.max():.3g}"
    return least if least == most else f"{least}..{most}"


def _write_metrics(file, step: int, groups: Sequence[Stack], outcomes: Sequence[Outcome]) -> None:
    for group, outcome in zip(groups, outcomes, strict=True):
        group.check()
        dead = (group.quiet >= group.configs[0].dead_after).float().mean(dim=1)
        for member, config in enumerate(group.configs):
            line = {
                "step": step,
                "out": config.out,
                "loss": outcome.loss[member].item(),
                "l0": outcome.l0[member].item(),
                "fvu": outcome.fvu[member].item(),
                "dead_share": dead[member].item(),
            }
            file.write(json.dumps(line) + "\n")
    file.flush()


def _forget_metrics(path: Path, step: int) -> None:
    """Takes out what was written after the checkpoint, for it will come again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A killed process may have left half a line.
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with whole_file(path) as fresh:
            fresh.write_text("".join(whole), encoding="utf-8")


def _save(groups: Sequence[Stack], step: int, path: Path) -> None:
    """Writes the checkpoint, whole or not at all."""
    tensors = {
        f"{number}.{name}": value
        for number, group in enumerate(groups)
        for name, value in group.tensors().items()
    }
    with whole_file(path) as fresh:
        save_file(tensors, fresh, metadata={"step": str(step)})


def _restore(groups: Sequence[Stack], path: Path) -> int:
    """Takes over the checkpoint, and returns its step; BadCheckpoint if it is not one of these stacks."""
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            for number, group in enumerate(groups):
                names = [n for n in file.keys() if n.startswith(f"{number}.")]  # noqa: SIM118
                group.restore(
                    step, {n.removeprefix(f"{number}."): file.get_tensor(n) for n in names}
                )
    except Exception as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}); remove it to begin anew") from error
    return step
