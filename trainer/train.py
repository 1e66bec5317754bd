"""Training: many dictionaries in one pass over the activations, to be broken off and continued at any step."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.site import Site
from trainer.architectures import Outcome
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig, Interrupted, TrainerError
from trainer.files import whole_file
from trainer.model import device
from trainer.source import BySite, Source
from trainer.stack import Stack, stacks
from trainer.stop import Stop

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
CHECKPOINT_EVERY, METRICS_EVERY = 250, 50


def train(
    configs: Sequence[TrainConfig],
    source: Source,
    folder: Path,
    stop: Stop,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Dictionary]:
    """The dictionaries after `epochs`, in the order of `configs`, going on from the checkpoint in `folder` if there is one.

    The configurations have everything in common but what a stack may differ in (`stacks`). The result has the same
    bytes however often training was broken off, for equal `threads`. `on_step` is told the number of each finished step.
    """
    config, path = configs[0], folder / CHECKPOINT
    total = source.count // config.batch * config.epochs
    if not total:
        raise BadConfig(f"{source.count} activations do not fill a batch of {config.batch}")
    scales = source.scale_and_mean(config.normalise_input)
    members = stacks(configs)
    sites = [Site.parse(those[0].site) for those in members]
    groups = [
        Stack(those, scales[site][1] * scales[site][0], total)
        for site, those in zip(sites, members, strict=True)
    ]
    step = _restore(groups, path) if path.exists() else 0
    batches = source.batches(config, step)
    folder.mkdir(parents=True, exist_ok=True)
    _forget_metrics(folder / METRICS, step)
    with (
        tqdm(desc="train", total=total, initial=step, unit=" steps") as bar,
        (folder / METRICS).open("a", encoding="utf-8") as metrics,
    ):
        while step < total:
            try:
                x = _scaled(next(batches), scales, step)
            except Interrupted:
                # Of a source that works long for a batch.
                if step:
                    _save(groups, step, path)
                raise
            with torch.no_grad():
                outcomes = [
                    group.advance(x[site]) for site, group in zip(sites, groups, strict=True)
                ]
            step += 1
            _show(bar, groups, outcomes)
            if step % METRICS_EVERY == 0 or step == total:
                _write_metrics(metrics, step, groups, outcomes)
            on_step(step)
            if stop.requested or step % CHECKPOINT_EVERY == 0 or step == total:
                _save(groups, step, path)
            if step < total:
                stop.check(f"step {step} of {total} is saved in {path}")
    made: dict[int, Dictionary] = {}
    for site, group in zip(sites, groups, strict=True):
        made |= zip(map(id, group.configs), group.dictionaries(scales[site][0]), strict=True)
    return [made[id(config)] for config in configs]


def _scaled(batch: BySite, scales: Mapping[Site, tuple[float, Tensor]], step: int) -> BySite:
    scaled = {site: (x * scales[site][0]).to(device()) for site, x in batch.items()}
    if not all(x.isfinite().all() for x in scaled.values()):
        raise TrainerError(
            f"an activation among those of step {step} is not finite; remove the harvest and run again"
        )
    return scaled


def _show(bar: tqdm, groups: Sequence[Stack], outcomes: Sequence[Outcome]) -> None:
    """The range over all dictionaries."""
    shares = [(group.quiet >= group.configs[0].dead_after).float().mean(dim=1) for group in groups]
    columns = {
        "L0": torch.cat([outcome.l0 for outcome in outcomes]),
        "FVU": torch.cat([outcome.fvu for outcome in outcomes]),
        "dead": torch.cat(shares),
    }
    bar.update()
    shown = {name: _range(values) for name, values in columns.items()}
    bar.set_postfix(shown, refresh=False)


def _range(values: Tensor) -> str:
    least, most = f"{values.min():.3g}", f"{values.max():.3g}"
    return least if least == most else f"{least}..{most}"


def _write_metrics(file, step: int, groups: Sequence[Stack], outcomes: Sequence[Outcome]) -> None:
    for group, outcome in zip(groups, outcomes, strict=True):
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
