"""What each architecture computes and loses, and the exact gradient of it, for a stack of dictionaries at once.

Parameters are stacks with a leading dimension of members; `x` is the same for all of them. Gradients are written out
by hand in terms of `Active`, so that they cost what the active features cost; each is held against autograd in float64
by the tests. `V` is the batch's variance, sum |x - mean x|^2, so that a loss of sum |x_hat - x|^2 / V is the FVU.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary
from trainer.active import Active
from trainer.config import Precision
from trainer.product import product
from trainer.ranks import ALONE, Ranks

Stack = dict[str, Tensor]
"""Parameters, or their gradients, by name; [members, ...]."""
LEAST_NORM = 1e-8


@dataclass(frozen=True)
class Hyper:
    """What may differ from member to member of a stack, [members] each, and what holds for all."""

    alpha: Float[Tensor, " members"]
    """Weight of the sparsity term at this step, warm-up included."""
    k: tuple[int, ...]
    """Active features per token."""
    mean_over_d: bool = False
    """The paper's code: squared error averaged over d_model instead of summed."""
    aux_k: int = 0
    """Dead features that AuxK lets explain the error; 0: none."""
    aux_weight: float = 1 / 32
    precision: Precision = "float32"
    """Of the factors of the large products."""
    bandwidth: float = 0.25
    """Of the kernel that gives JumpReLU's thresholds a gradient."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: the numbers of features that reconstruct on their own, ascending; the last is all."""
    dead: Tensor | None = None
    """Which features AuxK is for, [members, features]."""
    guess: Float[Tensor, " members"] | None = None
    """Below the smallest activation that BatchTopK will let through, most likely; a wrong one costs time."""
    ranks: Ranks = ALONE
    """Processes among which the tokens of `x` or the features of the parameters are divided."""

    def of(self, members: slice) -> "Hyper":
        """What of it concerns those members."""
        return replace(
            self,
            alpha=self.alpha[members],
            k=self.k[members],
            dead=None if self.dead is None else self.dead[members],
            guess=None if self.guess is None else self.guess[members],
        )


class Outcome(NamedTuple):
    """What one batch says of each member; of several ranks, the share of it that this one's adds to the sum."""

    loss: Float[Tensor, " members"]
    l0: Float[Tensor, " members"]
    fvu: Float[Tensor, " members"]
    fired: Tensor
    """[members, features]"""
    least_active: Float[Tensor, " members"]
    """The smallest activation that BatchTopK let through; 0 for all others."""


class Architecture(Protocol):
    """One kind of dictionary."""

    @property
    def unit_decoder(self) -> bool:
        """Whether the decoder's rows are kept at unit norm."""
        ...

    def start(
        self, n_features: int, d_model: int, mean: Tensor, generator: torch.Generator
    ) -> Stack:
        """One member's first parameters, without the leading dimension; `mean` is that of x."""
        ...

    def step(
        self, p: Stack, x: Float[Tensor, "tokens d_model"], hyper: Hyper
    ) -> tuple[Outcome, Stack]:
        """What one batch says, and the gradient of the loss, or of several ranks the share that this one's adds to it."""
        ...

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        """One member as it will be served; x was multiplied by `scale` before training.

        `threshold` is the running mean of `Outcome.least_active`.
        """
        ...


def untied(n_features: int, d_model: int, mean: Tensor, generator: torch.Generator) -> Stack:
    """A decoder of random unit rows, its transpose as encoder, and the mean of x as decoder bias."""
    W = torch.randn(n_features, d_model, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    return {"W_enc": W.clone(), "b_enc": torch.zeros(n_features), "W_dec": W, "b_dec": mean.clone()}


def encode(x: Tensor, W: Tensor, bias: Tensor, precision: Precision) -> Tensor:
    """x W^T + bias of all members, [members, tokens, features]; x may be one for all."""
    return product(x.expand(len(W), -1, -1), W.mT, precision, bias)


def move_with_centre(p: Stack, gradients: Stack) -> None:
    """Adds to b_dec's gradient what comes through x - b_dec."""
    gradients["b_dec"] -= (gradients["b_enc"][:, None] @ p["W_enc"]).squeeze(1)


def hold_unit_rows(W: Tensor, gradient: Tensor) -> None:
    """Takes out of the gradient what would make rows longer or shorter."""
    gradient.addcmul_(W, torch.linalg.vecdot(gradient, W)[:, :, None], value=-1.0)


def variance_of(x: Tensor, ranks: Ranks) -> Tensor:
    mean = ranks.over_tokens(x.sum(dim=0)) / ranks.all_tokens(len(x))
    return ranks.over_tokens((x - mean).square().sum()).clamp(min=LEAST_NORM)


def outcome_of(loss: Tensor, squared: Tensor, x: Tensor, f: Active, ranks: Ranks) -> Outcome:
    l0, fvu = f.count() / ranks.all_tokens(len(x)), squared / variance_of(x, ranks)
    return Outcome(loss, l0, fvu, f.fired(), torch.zeros_like(loss))
