"""Dictionaries whose sparsity is a number of active features: TopK, BatchTopK, Matryoshka."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steer_server.dictionary.dictionary import Activation, Dictionary
from trainer.active import Active, at, at_columns
from trainer.selection import largest_of_all, top_k
from trainer.step import (
    LEAST_NORM,
    Hyper,
    Outcome,
    Stack,
    encode,
    hold_unit_rows,
    move_with_centre,
    untied,
    variance_of,
)


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
        return untied(n_features, d_model, mean, generator)

    def step(self, p: Stack, x: Tensor, hyper: Hyper) -> tuple[Outcome, Stack]:
        centred = x - p["b_dec"][:, None]
        z = encode(centred, p["W_enc"], p["b_enc"], hyper.precision)
        f, least = self._choose(z, hyper)
        ends = hyper.prefixes or (z.shape[2],)
        edges = list(zip((0, *ends), ends, strict=False))
        blocks = [f.columns(*edge) for edge in edges] if len(edges) > 1 else [f]
        decoders = [p["W_dec"][:, first:last] for first, last in edges]
        variance = variance_of(x, hyper.ranks)
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
        move_with_centre(p, gradients)
        hold_unit_rows(p["W_dec"], gradients["W_dec"])
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
            kept &= values > 0
            return at_columns(columns, kept, z, hyper.precision), z.new_zeros(members)
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
            weight = hyper.aux_weight / total.clamp(min=LEAST_NORM)
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
        weight = hyper.aux_weight / error.square().sum(dim=(1, 2)).clamp(min=LEAST_NORM)
        weight = torch.where(hyper.dead.any(dim=1), weight, 0.0)
        g = missed * (2 * weight)[:, None, None]
        pulled = f.pull(g, p["W_dec"])
        gradients["W_enc"] += pulled.transposed(centred)
        gradients["b_enc"] += pulled.sum_tokens()
        gradients["W_dec"] += f.transposed(g)
        return weight * missed.square().sum(dim=(1, 2))


def prefixes(n_features: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Matryoshka's prefixes: `shares` of the features, the last of which is all of them."""
    return tuple(sorted({max(1, round(share * n_features)) for share in (*shares, 1.0)}))


def _join(parts: Sequence[Tensor]) -> Tensor:
    """The features of all parts; the only part itself, for a copy of it costs a pass over memory."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
