"""Dictionaries whose sparsity comes from a penalty: the paper's tied one, ReLU, JumpReLU, Gated."""

import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Activation, Dictionary
from trainer.active import at
from trainer.step import (
    LEAST_NORM,
    Hyper,
    Outcome,
    Stack,
    encode,
    hold_unit_rows,
    move_with_centre,
    outcome_of,
    untied,
)


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
        norm = p["M"].norm(dim=2, keepdim=True).clamp(min=LEAST_NORM)
        W = p["M"] / norm
        z = encode(x, W, p["b_enc"], hyper.precision)
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
        return outcome_of(loss, squared, x, f, hyper.ranks), {"M": dM, "b_enc": pulled.sum_tokens()}

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        rows = p["M"] / p["M"].norm(dim=1, keepdim=True).clamp(min=LEAST_NORM)
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
        return untied(n_features, d_model, mean, generator)

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        z = encode(x, p["W_enc"], p["b_enc"], hyper.precision)
        f = at(z > 0, z, hyper.precision)
        error = hyper.ranks.over_features(f.decode(p["W_dec"])) + p["b_dec"][:, None] - x
        tokens = hyper.ranks.all_tokens(len(x))
        divisor = tokens * x.shape[1] if hyper.mean_over_d else tokens
        g = error * (2 / divisor)
        weight = hyper.alpha / tokens
        norm = p["W_dec"].norm(dim=2)
        pulled = f.pull(g, p["W_dec"], plus=f.of_feature(weight[:, None] * norm))
        total = f.sum_tokens()
        shrink = weight[:, None] * total / norm.clamp(min=LEAST_NORM)
        gradients = {
            "W_enc": pulled.transposed(x),
            "b_enc": pulled.sum_tokens(),
            "W_dec": f.transposed(g) + shrink[:, :, None] * p["W_dec"],
            "b_dec": hyper.ranks.once(g.sum(dim=1)),
        }
        squared = hyper.ranks.once(error.square().sum(dim=(1, 2)))
        loss = squared / divisor + weight * (total * norm).sum(dim=1)
        return outcome_of(loss, squared, x, f, hyper.ranks), gradients

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        return Dictionary(p["W_enc"].T, p["b_enc"], p["W_dec"], p["b_dec"], input_scale=scale)


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
        found = untied(n_features, d_model, mean, generator)
        # Half of what random directions vary by: from far below, thresholds do not find their way in a short training.
        return found | {"log_threshold": torch.full((n_features,), 0.5).log()}

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        z = encode(x, p["W_enc"], p["b_enc"], hyper.precision)
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
        hold_unit_rows(p["W_dec"], gradients["W_dec"])
        squared = hyper.ranks.once(error.square().sum(dim=(1, 2)))
        loss = squared / tokens + weight * f.count()
        return outcome_of(loss, squared, x, f, hyper.ranks), gradients

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
        found = untied(n_features, d_model, mean, generator)
        zeros = found.pop("b_enc")
        return found | {"b_gate": zeros, "b_mag": zeros.clone(), "r_mag": zeros.clone()}

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        centred = x - p["b_dec"][:, None]
        y = encode(centred, p["W_enc"], torch.zeros_like(p["b_gate"]), hyper.precision)
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
        move_with_centre(p, gradients)
        del gradients["b_enc"]
        hold_unit_rows(p["W_dec"], gradients["W_dec"])
        squared = hyper.ranks.once(error.square().sum(dim=(1, 2)))
        loss = (squared + hyper.ranks.once(aside.square().sum(dim=(1, 2)))) / tokens
        loss = loss + weight * h.sum_tokens().sum(dim=1)
        return outcome_of(loss, squared, x, f, hyper.ranks), gradients

    def dictionary(self, p: Stack, scale: float, hyper: Hyper, threshold: float) -> Dictionary:
        gate = p["W_enc"].T, p["b_gate"], p["r_mag"], p["b_mag"]
        return Dictionary.gated(*gate, p["W_dec"], p["b_dec"], input_scale=scale)
