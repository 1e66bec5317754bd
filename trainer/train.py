"""Training: Adam over the harvested activations, to be broken off and continued at any step."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from steer_server.dictionary.dictionary import Dictionary
from trainer import gradient
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig
from trainer.files import whole_file
from trainer.harvest import Activations
from trainer.model import device
from trainer.stop import Stop

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_EVERY = 250
_SCALE_SHARDS = 16


class State:
    """Everything that changes while training.

    Random numbers are drawn from the seed for the first weights and from the seed and the epoch for
    the order of activations, so `step` is all the random state there is.
    """

    def __init__(self, config: TrainConfig, d_model: int) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        M = torch.empty(config.n_features, d_model)
        torch.nn.init.xavier_uniform_(M, generator=generator)
        self.step = 0
        self.M = M.to(device()).requires_grad_()
        self.b = torch.zeros(config.n_features, device=device()).requires_grad_()
        self.optimiser = torch.optim.Adam([self.M, self.b], lr=config.lr)

    def update(self, step: gradient.Step) -> None:
        """One step of Adam."""
        self.M.grad, self.b.grad = step.M, step.b
        self.optimiser.step()
        self.step += 1

    def save(self, path: Path) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {"M": self.M.detach(), "b": self.b.detach()}
        for name, parameter in (("M", self.M), ("b", self.b)):
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{name}.{key}"] = value
        with whole_file(path) as fresh:
            save_file(tensors, fresh, metadata={"step": str(self.step)})

    def restore(self, path: Path) -> None:
        """Takes over the checkpoint; BadCheckpoint if it is not one of this shape."""
        try:
            with safe_open(path, framework="pt") as file:
                self.step = int(file.metadata()["step"])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            with torch.no_grad():
                self.M.copy_(tensors["M"])
                self.b.copy_(tensors["b"])
            for name, parameter in (("M", self.M), ("b", self.b)):
                keys = ("step", "exp_avg", "exp_avg_sq")
                # Adam keeps its step count on the CPU.
                self.optimiser.state[parameter] = {
                    key: tensors[f"{name}.{key}"].to("cpu" if key == "step" else device())
                    for key in keys
                }
        except Exception as error:
            raise BadCheckpoint(
                f"{path} cannot be read ({error}); remove it to begin anew"
            ) from error


def train(
    config: TrainConfig,
    activations: Activations,
    folder: Path,
    stop: Stop,
    on_step: Callable[[int], None] = lambda step: None,
) -> Dictionary:
    """The dictionary after `config.epochs`, going on from the checkpoint in `folder` if there is one.

    The result has the same bytes however often training was broken off, for equal `threads`.
    `on_step` is told the number of each finished step.
    """
    path = folder / CHECKPOINT
    state = State(config, activations.d_model)
    if path.exists():
        state.restore(path)
    scale = input_scale(activations) if config.normalise_input else 1.0
    per_epoch = activations.count // config.batch
    if not per_epoch:
        raise BadConfig(f"{activations.count} activations do not fill a batch of {config.batch}")
    total = per_epoch * config.epochs
    order = epoch_order(config, activations.count, state.step // per_epoch)
    with tqdm(desc="train", total=total, initial=state.step, unit=" steps") as bar:
        while state.step < total:
            epoch, place = divmod(state.step, per_epoch)
            if place == 0:
                order = epoch_order(config, activations.count, epoch)
            index = order[place * config.batch :][: config.batch]
            x = (activations.gather(index) * scale).to(device())
            with torch.no_grad():
                step = gradient.step(state.M, state.b, x, config.alpha, config.loss_reduction)
            state.update(step)
            bar.update()
            bar.set_postfix(
                loss=f"{step.loss:.4f}", L0=f"{step.l0:.1f}", FVU=f"{step.fvu:.3f}", refresh=False
            )
            on_step(state.step)
            if stop.requested or state.step % CHECKPOINT_EVERY == 0 or state.step == total:
                state.save(path)
            if state.step < total:
                stop.check(f"step {state.step} of {total} is saved in {path}")
    rows = gradient.normalised(state.M.detach()).cpu()
    return Dictionary.tied(rows, state.b.detach().cpu(), input_scale=scale)


def input_scale(activations: Activations) -> float:
    """s with E|s x|^2 = d_model, over shards spread evenly through the harvest."""
    stride = -(-len(activations.shards) // _SCALE_SHARDS)
    chosen = activations.shards[::stride]
    total = sum(shard.double().square().sum().item() for shard in chosen)
    rows = sum(len(shard) for shard in chosen)
    return math.sqrt(activations.d_model * rows / total)


def epoch_order(config: TrainConfig, count: int, epoch: int) -> Tensor:
    """The random order of all activations in that epoch."""
    generator = torch.Generator().manual_seed(config.seed + 1 + 1_000_003 * epoch)
    return torch.randperm(count, generator=generator)
