"""Dictionaries of one shape and architecture that train together: parameters, optimiser, schedules."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import psutil
import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary
from trainer.architectures import ARCHITECTURES
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig, TrainerError
from trainer.graph import Replayed
from trainer.model import device
from trainer.ranks import ALONE, Ranks
from trainer.resample import resample_
from trainer.step import Hyper, Outcome
from trainer.top_k import TopK, prefixes

_FREE = {"k", "alpha", "lr", "seed", "out"}
"""What members of a stack may differ in."""
REPLICATED = ("b_dec",)
"""Parameters that every rank has whole when features are divided; all others have a row for each feature."""
_MEMORY = 0.999
"""Of the running mean of BatchTopK's threshold; of a training so short that this would span most of it, a tenth."""
_ASK_EVERY = 50
"""Steps after which a GPU is asked again whether some feature is still dead."""
_CACHE = 2**21
"""Activations that stay in a CPU's caches from one pass over them to the next."""


def stacks(configs: Sequence[TrainConfig]) -> list[list[TrainConfig]]:
    """The configurations of one pass, those together that may train as one stack."""
    common = [field.name for field in fields(TrainConfig) if field.name not in _FREE]
    found: dict[str, list[TrainConfig]] = {}
    for config in configs:
        found.setdefault(config.digest(common), []).append(config)
    return list(found.values())


class Stack:
    """Everything that changes while they train.

    Random numbers are drawn from the seeds, for the first weights, and from seeds and `step`, for resampling, so `step`
    is all the random state there is.
    """

    def __init__(
        self, configs: Sequence[TrainConfig], mean: Tensor, steps: int, ranks: Ranks = ALONE
    ) -> None:
        """`mean` is that of x as it comes to `advance`; `steps` are those of the whole training."""
        first = configs[0]
        _check_memory(configs, len(mean), ranks)
        self._ranks = ranks
        self.configs = list(configs)
        self.steps = steps
        self.step = 0
        d_model = len(mean)
        self._architecture = ARCHITECTURES[first.architecture]
        self._mean = mean
        members = [self._first(config) for config in configs]
        self.parameters = {
            name: torch.stack([self._own(name, member[name]) for member in members]).to(device())
            for name in members[0]
        }
        ranks.take_first_(self._whole(self.parameters))
        features = ranks.count_own(first.n_features)
        self.quiet = torch.zeros(len(configs), features, dtype=torch.int64, device=device())
        """Tokens since each feature was last active."""
        self.threshold = torch.zeros(len(configs), device=device())
        self._memory = min(_MEMORY, max(0.0, 1 - 10 / steps))
        self._guess = torch.zeros(len(configs), device=device())
        """What BatchTopK's next threshold hardly falls below; it decides in which order sums are taken."""
        self._alpha = torch.tensor([config.alpha for config in configs], device=device())
        self._now = torch.zeros((), dtype=torch.int64, device=device())
        """The step, for the device."""
        self._lost_at = torch.full((len(configs),), -1, dtype=torch.int64, device=device())
        """The first step at which a loss was not finite; -1: none was."""
        self._ask_at, self._some_dead = 0, True
        self._replayed: Replayed | None = None
        self._hyper = Hyper(
            self._alpha.clone(),
            tuple(config.k for config in configs),
            first.loss_reduction == "mean",
            {0: d_model // 2, -1: 0}.get(first.aux_k, first.aux_k),
            precision=first.precision,
            bandwidth=first.bandwidth,
            prefixes=tuple(map(ranks.count_own, prefixes(first.n_features, first.prefixes)))
            if first.architecture == "matryoshka"
            else (),
            ranks=ranks,
        )
        # Each member's slices are parameters of their own, so that each may have its own learning rate.
        self._slices = [
            {name: stacked[member] for name, stacked in self.parameters.items()}
            for member in range(len(configs))
        ]
        on_gpu = device().type == "cuda"
        groups = [
            {"params": list(slices.values())}
            | ({"lr": torch.zeros((), device=device())} if on_gpu else {})
            for slices in self._slices
        ]
        self._optimiser = torch.optim.Adam(groups, fused=True, capturable=on_gpu)

    def advance(self, x: Tensor) -> Outcome:
        """One step on a batch, or on this rank's tokens of it; TrainerError if it leads out of the numbers, on a GPU not before `check`.

        On a GPU the outcome holds until the next step.
        """
        self._schedule()
        revive = self._some_may_be_dead(len(x))
        if x.is_cuda and isinstance(self._architecture, TopK) and self._ranks.size == 1:
            # The others ask how many features are active, and wait for the answer.
            self._replayed = self._replayed or Replayed(self.update)
            outcome = self._replayed(x, revive)
        else:
            outcome = self.update(x, revive)
        self.step += 1
        if self._resamples():
            self._resample(x)
        if not x.is_cuda:
            self.check()
        return outcome

    def update(self, x: Tensor, revive: bool) -> Outcome:
        """The device's part of a step. `revive`: some feature may be dead."""
        first = self.configs[0]
        hyper = replace(
            self._hyper,
            dead=self.quiet >= first.dead_after if revive else None,
            guess=self._guess,
        )
        outcomes = []
        for block in self._blocks(len(x)):
            parameters = {name: value[block] for name, value in self.parameters.items()}
            found = self._architecture.step(parameters, x, hyper.of(block))
            outcome, gradients = self._together(*found)
            _clip(gradients, first.clip, self._ranks)
            for number, slices in enumerate(self._slices[block]):
                for name, parameter in slices.items():
                    parameter.grad = gradients[name][number]
            outcomes.append(outcome)
        outcome = Outcome(*(torch.cat(parts) for parts in zip(*outcomes, strict=True)))
        lost = ~outcome.loss.isfinite() & (self._lost_at < 0)
        self._lost_at.copy_(torch.where(lost, self._now, self._lost_at))
        self._optimiser.step()
        if self._architecture.unit_decoder:
            W = self.parameters["W_dec"]
            W /= torch.linalg.vector_norm(W, dim=2, keepdim=True).clamp(min=1e-8)
        self.quiet += self._ranks.all_tokens(len(x))
        self.quiet.masked_fill_(outcome.fired, 0)
        self.threshold.lerp_(outcome.least_active, 1 - self._memory)
        torch.mul(outcome.least_active, 0.9, out=self._guess)
        self._now += 1
        return outcome

    def check(self) -> None:
        """TrainerError if a step led out of the numbers; waits for the device."""
        lost = {c.out: at for c, at in zip(self.configs, self._lost_at.tolist(), strict=True)}
        lost = {out: at for out, at in lost.items() if at >= 0}
        if lost:
            raise TrainerError(
                f"the loss of {', '.join(lost)} is not finite at step {min(lost.values())}; the checkpoint "
                "before it is kept: use a smaller lr"
            )

    def _schedule(self) -> None:
        """Sets what depends on the number of the step."""
        first = self.configs[0]
        warm = min(1.0, (self.step + 1) / first.sparsity_warmup) if first.sparsity_warmup else 1.0
        torch.mul(self._alpha, warm, out=self._hyper.alpha)
        factor = self._factor(first)
        for config, group in zip(self.configs, self._optimiser.param_groups, strict=True):
            rate = config.learning_rate(self.steps) * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _resamples(self) -> bool:
        """Whether dead features begin anew after this step."""
        first = self.configs[0]
        every = first.resample_every
        return (
            bool(every) and self.step % every == 0 and self.step <= (1 - first.decay) * self.steps
        )

    def _resample(self, x: Tensor) -> None:
        """Dead features begin anew as tokens of `x`, without what the optimiser remembers of them."""
        dictionaries = self.dictionaries(1.0)
        dead = self.quiet >= self.configs[0].dead_after
        for number, (config, slices) in enumerate(zip(self.configs, self._slices, strict=True)):
            own = dead[number]
            if not own.any():
                continue
            first = {name: value.to(device()) for name, value in self._first(config).items()}
            generator = torch.Generator().manual_seed((config.seed << 32) + self.step)
            dictionary = dictionaries[number].to(device())
            resample_(slices, first, own, x, dictionary, generator)
            for name, parameter in slices.items():
                if name not in REPLICATED:
                    state = self._optimiser.state[parameter]
                    state["exp_avg"][own] = 0.0
                    state["exp_avg_sq"][own] = 0.0
        # Ranks with other tokens drew others.
        self._ranks.take_first_(self._whole(self.parameters))
        self.quiet.masked_fill_(dead, 0)
        self._ask_at = self.step

    def _first(self, config: TrainConfig) -> dict[str, Tensor]:
        """A member's parameters before the first step, of all features."""
        generator = torch.Generator().manual_seed(config.seed)
        return self._architecture.start(config.n_features, len(self._mean), self._mean, generator)

    def _some_may_be_dead(self, tokens: int) -> bool:
        """Whether AuxK may have work; a GPU is asked only when the answer may have changed.

        The step is the same, bit for bit, if it looks for dead features where there are none.
        """
        if device().type == "cpu" or not self._hyper.aux_k or self._ranks.size > 1:
            return True
        if self.step >= self._ask_at:
            left = self.configs[0].dead_after - int(self.quiet.max())
            self._some_dead = left <= 0
            self._ask_at = self.step + (_ASK_EVERY if left <= 0 else -(-left // tokens))
        return self._some_dead

    def dead_share(self) -> Tensor:
        """Of each member's features."""
        first = self.configs[0]
        dead = (self.quiet >= first.dead_after).float().sum(dim=1)
        return self._ranks.over_features(dead) / first.n_features

    def dictionaries(
        self, scale: float, parameters: Mapping[str, Tensor] | None = None
    ) -> list[Dictionary]:
        """By member; x was multiplied by `scale` before training. `parameters` are those of all ranks' features."""
        self.check()
        # The running mean began at 0.
        seen = 1 - self._memory**self.step
        found = []
        for member in range(len(self.configs)):
            hyper = replace(self._hyper, k=self._hyper.k[member : member + 1])
            own = {n: v[member].cpu() for n, v in (parameters or self.parameters).items()}
            threshold = float(self.threshold[member]) / seen
            found.append(self._architecture.dictionary(own, scale, hyper, threshold))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; TrainerError if there is nothing worth keeping."""
        self.check()
        found = {f"p.{name}": value for name, value in self.parameters.items()}
        found |= {"quiet": self.quiet, "threshold": self.threshold, "guess": self._guess}
        for member, slices in enumerate(self._slices):
            for name, parameter in slices.items():
                for key, value in self._optimiser.state[parameter].items():
                    found[f"adam.{member}.{name}.{key}"] = value
        return found

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` returned after that step; BadCheckpoint if it is not of this stack."""
        self.step, self._ask_at, self._replayed = step, 0, None
        self._now.fill_(step)
        for name, value in self.parameters.items():
            value.copy_(tensors[f"p.{name}"])
        self.quiet.copy_(tensors["quiet"])
        self.threshold.copy_(tensors["threshold"])
        self._guess.copy_(tensors["guess"])
        for member, slices in enumerate(self._slices):
            for name, parameter in slices.items():
                kept = f"adam.{member}.{name}."
                state = {k.removeprefix(kept): v for k, v in tensors.items() if k.startswith(kept)}
                if not state:
                    raise BadCheckpoint(f"it has no {kept}*")
                self._optimiser.state[parameter] = {k: v.to(device()) for k, v in state.items()}

    def _own(self, name: str, parameter: Tensor) -> Tensor:
        return parameter if name in REPLICATED else self._ranks.own_features(parameter)

    def _whole(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Those that every rank has whole, and that therefore must be the same on all."""
        return [t for n, t in tensors.items() if not self._ranks.split_features or n in REPLICATED]

    def _together(
        self, outcome: Outcome, gradients: dict[str, Tensor]
    ) -> tuple[Outcome, dict[str, Tensor]]:
        """What all ranks' shares make together."""
        if self._ranks.size == 1:
            return outcome, gradients
        gradients = {name: g.contiguous() for name, g in gradients.items()}
        fired = outcome.fired.float()
        shares = [outcome.loss, outcome.l0, outcome.fvu, *self._whole(gradients)]
        self._ranks.sum_([*shares, fired] if self._ranks.split_tokens else shares)
        return outcome._replace(fired=fired > 0), gradients

    def _factor(self, config: TrainConfig) -> float:
        """Of the learning rate at this step."""
        rise = min(1.0, (self.step + 1) / config.warmup) if config.warmup else 1.0
        left = (self.steps - self.step) / max(1.0, config.decay * self.steps)
        return rise * min(1.0, left) if config.decay else rise

    def _blocks(self, tokens: int) -> list[slice]:
        """Members whose step is taken together: all of them on a GPU, on a CPU what its caches hold."""
        members = len(self.configs)
        together = members
        if device().type == "cpu":
            together = max(1, _CACHE // (tokens * self.quiet.shape[1]))
        return [slice(first, first + together) for first in range(0, members, together)]


def _clip(gradients: dict[str, Tensor], longest: float, ranks: Ranks) -> None:
    """Shortens each member's gradient to that norm, if it is longer; 0: any may be as long as it is."""
    if not longest:
        return
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]
    if ranks.split_features:
        squares = [
            ranks.once(norm.square()) if name in REPLICATED else norm.square()
            for name, norm in zip(gradients, norms, strict=True)
        ]
        norm = ranks.over_features(torch.stack(squares).sum(dim=0)).sqrt()
    else:
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factor = (longest / norm.clamp(min=1e-12)).clamp(max=1.0)
    # Times 1 is the same bits: a GPU is not asked.
    if factor.is_cuda or (factor < 1).any():
        for gradient in gradients.values():
            gradient *= factor.view(-1, *[1] * (gradient.ndim - 1))


def _check_memory(configs: Sequence[TrainConfig], d_model: int, ranks: Ranks) -> None:
    """BadConfig if the weights, their gradients and Adam's moments, and z of a batch, cannot be there at once."""
    first = configs[0]
    matrices = 1 if first.architecture == "tied_relu" else 2
    features = ranks.count_own(first.n_features)
    tokens = first.batch // ranks.size if ranks.split_tokens else first.batch
    made_anew = 2 * tokens * features
    if device().type == "cuda":
        there = torch.cuda.mem_get_info()[0]
    else:
        there = psutil.virtual_memory().available / ranks.here
        # Freed blocks stay, and a process settles at about twice what it holds at once (`allocator.py`).
        made_anew *= 2
    needed = 4 * len(configs) * (4 * matrices * features * d_model + made_anew)
    # All look before any of them takes memory.
    ranks.meet()
    if needed > there:
        raise BadConfig(
            f"{len(configs)} dictionaries of {first.n_features} features need {needed / 2**30:.1f} GiB to train, "
            f"{there / 2**30:.1f} GiB are free; take fewer at once, a smaller n_features or a smaller batch, or more "
            "processes with parallel = 'features'"
        )
