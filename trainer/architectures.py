"""What each architecture computes and loses, and the exact gradient of it, for a stack of dictionaries at once.

Parameters are stacks with a leading dimension of members; `x` is the same for all of them. Gradients are written out
by hand in terms of `Active`, so that they cost what the active features cost; each is held against autograd in float64
by the tests. `V` is the batch's variance, sum |x - mean x|^2, so that a loss of sum |x_hat - x|^2 / V is the FVU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from steer_server.dictionary.dictionary import Activation, Dictionary
from trainer.active import Active, at, at_columns
from trainer.config import Precision
from trainer.product import product
from trainer.ranks import ALONE, Ranks
from trainer.selection import largest_of_all, top_k

Stack = dict[str, Tensor]
"""Parameters, or their gradients, by name; [members, ...]."""
_LEAST_NORM = 1e-8


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


class Tied:
    """The paper's dictionary (arXiv 2309.08600, section 2 and its code).

    For W = M / max(|M|, 1e-8) row by row: f = ReLU(x W^T + b), x_hat = f W,
    loss = mean_batch (reduce_d (x_hat - x)^2 + alpha |f|_1); the normalisation is differentiated through.
    """

    unit_decoder = False

    def start(
        self, n_features: int, d_model: int, mean: Tensor, generator: torch.Generator
    ) -> Stack:
        M = torch.empty(n_features, d_model)
        torch.nn.init.xavier_uniform_(M, generator=generator)
        return {"M": M, "b_enc": torch.zeros(n_features)}

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        norm = p["M"].norm(dim=2, keepdim=True).clamp(min=_LEAST_NORM)
        W = p["M"] / norm
        z = _encode(x, W, p["b_enc"], hyper.precision)
        f = at(z > 0, z, hyper.precision)
        error = hyper.ranks.over_features(f.decode(W)) - x
        tokens = hyper.ranks.all_tokens(len(x))
        divisor = tokens * x.shape[1] if hyper.mean_over_d else tokens
        g = error * (2 / divisor)
        pulled = f.pull(g, W, plus=f.of_member(hyper.alpha / tokens))
        dW = f.transposed(g) + pulled.transposed(x)
        # d(M/|M|): only the part of dW across the row turns it; along the row the norm undoes it.
        dM = dW.addcmul_(W, (dW * W).sum(dim=2, keepdim=True), value=-1.0).div_(norm)
        squared = hyper.ranks.once(error.square().sum(dim=(1, 2)))
        loss = squared / divisor + hyper.alpha * f.sum_tokens().sum(dim=1) / tokens
        return _outcome(loss, squared, x, f, hyper.ranks), {"M": dM, "b_enc": pulled.sum_tokens()}

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        rows = p["M"] / p["M"].norm(dim=1, keepdim=True).clamp(min=_LEAST_NORM)
        return Dictionary.tied(rows, p["b_enc"], input_scale=scale)


class Relu:
    """An untied dictionary with an L1 penalty that decoder norms cannot evade.

    f = ReLU(x W_enc^T + b_enc), x_hat = f W_dec + b_dec,
    loss = mean_batch (|x_hat - x|^2 + alpha sum_i f_i |W_dec_i|), as in Anthropic's April 2024 update.
    """

    unit_decoder = False

    def start(
        self, n_features: int, d_model: int, mean: Tensor, generator: torch.Generator
    ) -> Stack:
        return _untied(n_features, d_model, mean, generator)

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        z = _encode(x, p["W_enc"], p["b_enc"], hyper.precision)
        f = at(z > 0, z, hyper.precision)
        error = hyper.ranks.over_features(f.decode(p["W_dec"])) + p["b_dec"][:, None] - x
        tokens = hyper.ranks.all_tokens(len(x))
        divisor = tokens * x.shape[1] if hyper.mean_over_d else tokens
        g = error * (2 / divisor)
        weight = hyper.alpha / tokens
        norm = p["W_dec"].norm(dim=2)
        pulled = f.pull(g, p["W_dec"], plus=f.of_feature(weight[:, None] * norm))
        total = f.sum_tokens()
        shrink = weight[:, None] * total / norm.clamp(min=_LEAST_NORM)
        gradients = {
            "W_enc": pulled.transposed(x),
            "b_enc": pulled.sum_tokens(),
            "W_dec": f.transposed(g) + shrink[:, :, None] * p["W_dec"],
            "b_dec": hyper.ranks.once(g.sum(dim=1)),
        }
        squared = hyper.ranks.once(error.square().sum(dim=(1, 2)))
        loss = squared / divisor + weight * (total * norm).sum(dim=1)
        return _outcome(loss, squared, x, f, hyper.ranks), gradients

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        return Dictionary(p["W_enc"].T, p["b_enc"], p["W_dec"], p["b_dec"], input_scale=scale)


@dataclass(frozen=True)
class TopK:
    """The k largest activations of each token (Gao et al., arXiv 2406.04093), or k per token of a batch (BatchTopK).

    z = (x - b_dec) W_enc^T + b_enc, f = ReLU(z) where it is among the largest, x_hat = f W_dec + b_dec, of unit rows.
    loss = sum |x_hat - x|^2 / V + w_aux sum |e_hat - e|^2 / sum |e|^2, where e = x - x_hat is taken as given and e_hat
    is decoded from the `aux_k` largest activations of dead features. With `prefixes` the first term is the mean over
    those first features alone, with b_dec (Matryoshka, arXiv 2503.17547).
    """

    over_batch: bool = False
    unit_decoder: bool = field(default=True, init=False)

    def start(
        self, n_features: int, d_model: int, mean: Tensor, generator: torch.Generator
    ) -> Stack:
        return _untied(n_features, d_model, mean, generator)

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        centred = x - p["b_dec"][:, None]
        z = _encode(centred, p["W_enc"], p["b_enc"], hyper.precision)
        f, least = self._choose(z, hyper)
        ends = hyper.prefixes or (z.shape[2],)
        edges = list(zip((0, *ends), ends, strict=False))
        blocks = [f.columns(*edge) for edge in edges] if len(edges) > 1 else [f]
        decoders = [p["W_dec"][:, first:last] for first, last in edges]
        variance = _variance(x, hyper.ranks)
        error = -centred
        errors = []
        for block, W in zip(blocks, decoders, strict=True):
            error = error + hyper.ranks.over_features(block.decode(W))
            errors.append(error)
        squares = [hyper.ranks.once(e.square().sum(dim=(1, 2))) for e in errors]
        loss = torch.stack(squares).sum(dim=0) / (len(blocks) * variance)
        # What a block decodes is part of every reconstruction from its own on.
        g = torch.zeros_like(error)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for block, W, e in reversed(list(zip(blocks, decoders, errors, strict=True))):
            g = g + e * (2 / (len(blocks) * variance))
            pulled = block.pull(g, W)
            parts.append((pulled.transposed(centred), pulled.sum_tokens(), block.transposed(g)))
        W_enc, b_enc, W_dec = (_join(part[::-1]) for part in zip(*parts, strict=True))
        gradients = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}
        gradients["b_dec"] = hyper.ranks.once(g.sum(dim=1))
        if hyper.aux_k and hyper.dead is not None:
            at_once = z.is_cuda and hyper.ranks.size == 1
            revive = self._revive_all if at_once else self._revive
            loss = loss + revive(p, centred, z, error, hyper, gradients)
        _move_with_centre(p, gradients)
        _hold_unit_rows(p["W_dec"], gradients["W_dec"])
        l0 = f.count() / hyper.ranks.all_tokens(len(x))
        return Outcome(loss, l0, squares[-1] / variance, f.fired(), least), gradients

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        parts = p["W_enc"].T, p["b_enc"], p["W_dec"], p["b_dec"]
        if not self.over_batch:
            return Dictionary(*parts, Activation.TOP_K, scale, center_input=True, k=hyper.k[0])
        threshold_of_all = torch.full_like(p["b_enc"], threshold)
        return Dictionary(
            *parts, Activation.JUMP_RELU, scale, center_input=True, threshold=threshold_of_all
        )

    def _choose(self, z: Tensor, hyper: Hyper) -> tuple[Active, Tensor]:
        """What is active, and the smallest activation of each member."""
        members, tokens, _ = z.shape
        if not self.over_batch:
            values, columns = top_k(z, min(max(hyper.k), z.shape[2]))
            places = hyper.ranks.places(values).expand_as(values)
            kept = torch.stack([own < k for own, k in zip(places, hyper.k, strict=True)])
            return at_columns(columns, kept & (values > 0), z, hyper.precision), z.new_zeros(
                members
            )
        ranks = [hyper.ranks.all_tokens(tokens) * k for k in hyper.k]
        floor = z.new_zeros(members) if hyper.guess is None else hyper.guess
        if hyper.ranks.size > 1:
            least = hyper.ranks.nth_largest(z, ranks, floor).clamp(min=0.0)
            return at((z >= least[:, None, None]) & (z > 0), z, hyper.precision), least
        if z.is_cuda:
            # Nothing here waits for the device to count.
            least = largest_of_all(z, ranks)
            # Activations equal to the smallest count, too: a repeated token may repeat it at each token.
            most = sum(ranks) + members * tokens
            chosen = (z >= least[:, None, None]) & (z > 0)
            return at(chosen, z, hyper.precision, most), least
        f = at(z > floor[:, None, None], z, hyper.precision)
        if any(count < rank for count, rank in zip(f.count().tolist(), ranks, strict=True)):
            f = at(z > 0, z, hyper.precision)
        least = f.nth_largest(ranks)
        return f.only(f.values >= f.of_member(least)), least

    def _revive(
        self, p: Stack, centred: Tensor, z: Tensor, error: Tensor, hyper: Hyper, gradients: Stack
    ) -> Tensor:
        """AuxK: adds its gradients and returns its loss."""
        assert hyper.dead is not None
        losses = error.new_zeros(len(error))
        for member, dead in enumerate(hyper.dead):
            if not hyper.ranks.any_feature(dead.any()):
                continue
            rows = dead.nonzero().squeeze(1)
            none = not len(rows)
            if none:
                # The others have some: this rank takes part with its first feature, and chooses it nowhere.
                rows = rows.new_zeros(1)
            own = z[member : member + 1].index_select(2, rows)
            if len(rows) > hyper.aux_k or hyper.ranks.split_features:
                values, columns = top_k(own, min(hyper.aux_k, len(rows)))
                values = values.fill_(-torch.inf) if none else values
                kept = (hyper.ranks.places(values) < hyper.aux_k) & (values > 0)
                f = at_columns(columns, kept, own, hyper.precision)
            else:
                f = at(own > 0, own, hyper.precision)
            W = p["W_dec"][member : member + 1].index_select(1, rows)
            missed = hyper.ranks.over_features(f.decode(W)) + error[member]
            total = hyper.ranks.over_tokens(error[member].square().sum())
            weight = hyper.aux_weight / total.clamp(min=_LEAST_NORM)
            g = missed * (2 * weight)
            pulled = f.pull(g, W)
            found = {
                "W_enc": pulled.transposed(centred[member]),
                "b_enc": pulled.sum_tokens(),
                "W_dec": f.transposed(g),
            }
            for name, gradient in found.items():
                gradients[name][member].index_add_(0, rows, gradient[0])
            losses[member] = hyper.ranks.once(weight * missed.square().sum())
        return losses

    def _revive_all(
        self, p: Stack, centred: Tensor, z: Tensor, error: Tensor, hyper: Hyper, gradients: Stack
    ) -> Tensor:
        """The same at the width of all features, for a GPU, which need not say then how many are dead."""
        assert hyper.dead is not None
        among = z.masked_fill(~hyper.dead[:, None], float("-inf"))
        best = among.topk(min(hyper.aux_k, z.shape[2]), dim=2, sorted=False)
        f = at_columns(best.indices, best.values > 0, z, hyper.precision)
        missed = f.decode(p["W_dec"]) + error
        weight = hyper.aux_weight / error.square().sum(dim=(1, 2)).clamp(min=_LEAST_NORM)
        weight = torch.where(hyper.dead.any(dim=1), weight, 0.0)
        g = missed * (2 * weight)[:, None, None]
        pulled = f.pull(g, p["W_dec"])
        gradients["W_enc"] += pulled.transposed(centred)
        gradients["b_enc"] += pulled.sum_tokens()
        gradients["W_dec"] += f.transposed(g)
        return weight * missed.square().sum(dim=(1, 2))


class JumpRelu:
    """A threshold for each feature, learned (Rajamanoharan et al., arXiv 2407.14435).

    z = x W_enc^T + b_enc, f = z where z > theta = exp(log_threshold), x_hat = f W_dec + b_dec, of unit rows.
    loss = mean_batch (|x_hat - x|^2 + alpha L0). Thresholds take the paper's pseudo-derivatives, with a rectangle of
    width `bandwidth` as kernel K: d f / d theta = -theta K, d L0 / d theta = -K.
    """

    unit_decoder = True

    def start(
        self, n_features: int, d_model: int, mean: Tensor, generator: torch.Generator
    ) -> Stack:
        found = _untied(n_features, d_model, mean, generator)
        # Half of what random directions vary by: from far below, thresholds do not find their way in a short training.
        return found | {"log_threshold": torch.full((n_features,), 0.5).log()}

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        z = _encode(x, p["W_enc"], p["b_enc"], hyper.precision)
        threshold = p["log_threshold"].exp()
        f = at(z > threshold[:, None], z, hyper.precision)
        error = hyper.ranks.over_features(f.decode(p["W_dec"])) + p["b_dec"][:, None] - x
        tokens = hyper.ranks.all_tokens(len(x))
        g = error * (2 / tokens)
        pulled = f.pull(g, p["W_dec"])
        near = at((z - threshold[:, None]).abs() < hyper.bandwidth / 2, z, hyper.precision)
        weight = hyper.alpha / tokens
        felt = near.pull(g, p["W_dec"])
        slope = felt.values * near.of_feature(threshold) + near.of_member(weight)
        gradients = {
            "W_enc": pulled.transposed(x),
            "b_enc": pulled.sum_tokens(),
            "W_dec": f.transposed(g),
            "b_dec": hyper.ranks.once(g.sum(dim=1)),
            "log_threshold": -threshold / hyper.bandwidth * near.like(slope).sum_tokens(),
        }
        _hold_unit_rows(p["W_dec"], gradients["W_dec"])
        squared = hyper.ranks.once(error.square().sum(dim=(1, 2)))
        loss = squared / tokens + weight * f.count()
        return _outcome(loss, squared, x, f, hyper.ranks), gradients

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        parts = p["W_enc"].T, p["b_enc"], p["W_dec"], p["b_dec"]
        thresholds = p["log_threshold"].exp()
        return Dictionary(*parts, Activation.JUMP_RELU, scale, threshold=thresholds)


class Gated:
    """Which features are active and how strongly, decided apart (Rajamanoharan et al., arXiv 2404.16014).

    y = (x - b_dec) W_enc^T, gate = y + b_gate, f = ReLU(exp(r_mag) y + b_mag) where gate > 0,
    x_hat = f W_dec + b_dec, of unit rows. loss = mean_batch (|x_hat - x|^2 + alpha sum ReLU(gate)
    + |ReLU(gate) W_dec + b_dec - x|^2), where the last term takes W_dec and b_dec as given.
    """

    unit_decoder = True

    def start(
        self, n_features: int, d_model: int, mean: Tensor, generator: torch.Generator
    ) -> Stack:
        found = _untied(n_features, d_model, mean, generator)
        zeros = found.pop("b_enc")
        return found | {"b_gate": zeros, "b_mag": zeros.clone(), "r_mag": zeros.clone()}

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        centred = x - p["b_dec"][:, None]
        y = _encode(centred, p["W_enc"], torch.zeros_like(p["b_gate"]), hyper.precision)
        gain = p["r_mag"].exp()
        strength = y * gain[:, None] + p["b_mag"][:, None]
        gate = y + p["b_gate"][:, None]
        f = at((gate > 0) & (strength > 0), strength, hyper.precision)
        h = at(gate > 0, gate, hyper.precision)
        error = hyper.ranks.over_features(f.decode(p["W_dec"])) - centred
        aside = hyper.ranks.over_features(h.decode(p["W_dec"])) - centred
        tokens = hyper.ranks.all_tokens(len(x))
        g = error * (2 / tokens)
        weight = hyper.alpha / tokens
        pulled = f.pull(g, p["W_dec"])
        through = f.like(pulled.values * f.of_feature(gain))
        opened = h.pull(aside * (2 / tokens), p["W_dec"], plus=h.of_member(weight))
        # exp(r_mag) y is what is left of the strength without its bias.
        by_gain = f.like(pulled.values * (f.values - f.of_feature(p["b_mag"])))
        gradients = {
            "W_enc": through.transposed(centred) + opened.transposed(centred),
            "b_enc": through.sum_tokens() + opened.sum_tokens(),
            "b_gate": opened.sum_tokens(),
            "b_mag": pulled.sum_tokens(),
            "r_mag": by_gain.sum_tokens(),
            "W_dec": f.transposed(g),
            "b_dec": hyper.ranks.once(g.sum(dim=1)),
        }
        _move_with_centre(p, gradients)
        del gradients["b_enc"]
        _hold_unit_rows(p["W_dec"], gradients["W_dec"])
        squared = hyper.ranks.once(error.square().sum(dim=(1, 2)))
        loss = (squared + hyper.ranks.once(aside.square().sum(dim=(1, 2)))) / tokens
        loss = loss + weight * h.sum_tokens().sum(dim=1)
        return _outcome(loss, squared, x, f, hyper.ranks), gradients

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        gate = p["W_enc"].T, p["b_gate"], p["r_mag"], p["b_mag"]
        return Dictionary.gated(*gate, p["W_dec"], p["b_dec"], input_scale=scale)


ARCHITECTURES: dict[str, Architecture] = {
    "tied_relu": Tied(),
    "relu": Relu(),
    "top_k": TopK(),
    "batch_top_k": TopK(over_batch=True),
    "matryoshka": TopK(over_batch=True),
    "jump_relu": JumpRelu(),
    "gated": Gated(),
}


def prefixes(n_features: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Matryoshka's prefixes: `shares` of the features, the last of which is all of them."""
    return tuple(sorted({max(1, round(share * n_features)) for share in (*shares, 1.0)}))


def _untied(n_features: int, d_model: int, mean: Tensor, generator: torch.Generator) -> Stack:
    """A decoder of random unit rows, its transpose as encoder, and the mean of x as decoder bias."""
    W = torch.randn(n_features, d_model, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    return {"W_enc": W.clone(), "b_enc": torch.zeros(n_features), "W_dec": W, "b_dec": mean.clone()}


def _encode(x: Tensor, W: Tensor, bias: Tensor, precision: Precision) -> Tensor:
    """x W^T + bias of all members in one product, [members, tokens, features]; x may be one for all."""
    x = x.expand(len(W), -1, -1)
    if precision != "float32":
        return product(x, W.mT, precision).add_(bias[:, None])
    if len(W) == 1:
        return torch.addmm(bias[0], x[0], W[0].T)[None]
    return torch.baddbmm(bias[:, None], x, W.mT)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """The features of all parts; the only part itself, for a copy of it costs a pass over memory."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _move_with_centre(p: Stack, gradients: Stack) -> None:
    """Adds to b_dec's gradient what comes through x - b_dec."""
    gradients["b_dec"] -= (gradients["b_enc"][:, None] @ p["W_enc"]).squeeze(1)


def _hold_unit_rows(W: Tensor, gradient: Tensor) -> None:
    """Takes out of the gradient what would make rows longer or shorter."""
    gradient.addcmul_(W, torch.linalg.vecdot(gradient, W)[:, :, None], value=-1.0)


def _variance(x: Tensor, ranks: Ranks) -> Tensor:
    mean = ranks.over_tokens(x.sum(dim=0)) / ranks.all_tokens(len(x))
    return ranks.over_tokens((x - mean).square().sum()).clamp(min=_LEAST_NORM)


def _outcome(loss: Tensor, squared: Tensor, x: Tensor, f: Active, ranks: Ranks) -> Outcome:
    l0, fvu = f.count() / ranks.all_tokens(len(x)), squared / _variance(x, ranks)
    return Outcome(loss, l0, fvu, f.fired(), torch.zeros_like(loss))
