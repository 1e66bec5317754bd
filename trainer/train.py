"""Training: many dictionaries in one pass over the activations, to be broken off and continued at any step."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.site import Site
from trainer.checkpoint import restore, save, whole_parameters
from trainer.config import TrainConfig
from trainer.errors import BadConfig, Interrupted, TrainerError
from trainer.model import device
from trainer.progress import NOBODY, Progress, Watchers
from trainer.ranks import ALONE, Ranks
from trainer.source import BySite, Source
from trainer.stack import Stack, stacks
from trainer.stop import Stop

METRICS = "metrics.jsonl"
CHECKPOINT_EVERY = 250


def train(
    configs: Sequence[TrainConfig],
    source: Source,
    folder: Path,
    stop: Stop,
    on_step: Callable[[int], None] = lambda step: None,
    ranks: Ranks = ALONE,
    watchers: Watchers = NOBODY,
) -> list[Dictionary]:
    """The dictionaries after `epochs`, in the order of `configs`, going on from the checkpoint in `folder` if there is one.

    Of several ranks, the first returns them.

    The configurations have everything in common but what a stack may differ in (`stacks`). The result has the same
    bytes however often training was broken off, for equal `threads` and as many ranks. `on_step` is told the number of
    each finished step.
    """
    config = configs[0]
    total = source.count // config.batch * config.epochs
    if not total:
        raise BadConfig(f"{source.count} activations do not fill a batch of {config.batch}")
    scales = source.scale_and_mean(config.normalise_input)
    members = stacks(configs)
    sites = [Site.parse(those[0].site) for those in members]
    means = [scales[site][1] * scales[site][0] for site in sites]
    groups = [Stack(*some, total, ranks) for some in zip(members, means, strict=True)]
    step = restore(groups, folder, ranks)
    batches = source.batches(config, step, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / METRICS if ranks.first else None
    with Progress([*chain(*members)], metrics, step, total, watchers) as progress:
        while step < total:
            try:
                x = _scaled(next(batches), scales, step)
            except Interrupted:
                # Of a source that works long for a batch.
                if step:
                    save(groups, step, folder, ranks)
                raise
            with torch.no_grad():
                outcomes = [
                    group.advance(x[site]) for site, group in zip(sites, groups, strict=True)
                ]
            step += 1
            progress.update(step, outcomes, [group.dead_share() for group in groups])
            on_step(step)
            # All ranks decide on what was known at this moment; a signal that comes later waits for the next step.
            stopping = ranks.any(stop.requested)
            if stopping or step % CHECKPOINT_EVERY == 0 or step == total:
                save(groups, step, folder, ranks)
            if stopping and step < total:
                stop.requested = True
                stop.check(f"step {step} of {total} is saved in {folder}")
    if not ranks.first:
        return []
    made: dict[int, Dictionary] = {}
    wholes = whole_parameters(groups, folder, ranks)
    for site, group, whole in zip(sites, groups, wholes, strict=True):
        made |= zip(map(id, group.configs), group.dictionaries(scales[site][0], whole), strict=True)
    return [made[id(config)] for config in configs]


def _scaled(batch: BySite, scales: Mapping[Site, tuple[float, Tensor]], step: int) -> BySite:
    scaled = {site: x * scales[site][0] for site, x in batch.items()}
    if not all(x.isfinite().all() for x in scaled.values()):
        raise TrainerError(
            f"an activation among those of step {step} is not finite; remove the harvest and run again"
        )
    return {site: x.to(device()) for site, x in scaled.items()}
