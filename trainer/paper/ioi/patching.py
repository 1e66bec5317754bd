"""Base prompts that take on the activations of their counterfactuals, feature by feature (arXiv 2309.08600, section 4.1).

    x'_i = x_i + sum over F of (c'_{i,j} - c_{i,j}) W_dec[j]

at every position i; c are the base's activations, c' the counterfactual's, and what the dictionary misses of x stays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.site import Site
from trainer.paper.ioi.prompts import Prompt
from trainer.paper.rest import Rest

_TOKENS_AT_ONCE = 4096
"""In one run of the model."""


class Effect(NamedTuple):
    """What patching a set of features does, mean over the prompts."""

    kl: float
    """KL(patched || counterfactual) of the next token, nats: 0 if the patch carries all over."""
    edit: float
    """|x' - x|, mean over prompts and their positions."""


class Bench:
    """Prompts at a site, whatever dictionary patches them."""

    def __init__(self, model: nn.Module, site: Site, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        self.rest = Rest(model, site, _padded([p.tokens for p in prompts]), self.lengths)
        other = Rest(model, site, _padded([p.counterfactual for p in prompts]), self.lengths)
        self.counterfactual_x = other.x
        self.counterfactual = other.unedited
        positions = torch.arange(self.rest.x.shape[1])
        self.real = (positions < self.lengths[:, None]).to(self.rest.x.device)
        self.forwards = 0
        """Prompts that the model ran on for edits."""
        self.calls = 0
        """Times that it ran."""

    @torch.no_grad()
    def effects(self, deltas: Float[Tensor, "sets prompts positions d_model"]) -> list[Effect]:
        """Of each change of x."""
        sets, count, length, _ = deltas.shape
        at_once = max(1, _TOKENS_AT_ONCE // length)
        rows = torch.arange(sets * count)
        kls = []
        for some in rows.split(at_once):
            prompts = some % count
            x = self.rest.x[prompts] + deltas[some // count, prompts]
            kls.append(kl(self.rest.log_probabilities(x, prompts), self.counterfactual[prompts]))
            self.calls += 1
        self.forwards += len(rows)
        means = torch.cat(kls).view(sets, count).mean(dim=1)
        edits = deltas.norm(dim=-1)[:, self.real].mean(dim=1)
        return [Effect(*pair) for pair in zip(means.tolist(), edits.tolist(), strict=True)]


class Patching:
    """A dictionary's features on a bench."""

    def __init__(self, bench: Bench, dictionary: Dictionary) -> None:
        self.bench = bench
        with torch.no_grad():
            mine, theirs = (dictionary.encode(x) for x in (bench.rest.x, bench.counterfactual_x))
            change = (theirs - mine).masked_fill(~bench.real[..., None], 0.0)
        differing = change.abs().amax(dim=(0, 1)).nonzero().squeeze(1)
        self.differing: list[int] = differing.tolist()
        """Features that differ somewhere: patching any other changes nothing."""
        self.change: Float[Tensor, "prompts positions differing"] = change[..., differing]
        self.decoder: Float[Tensor, "differing d_model"] = (
            dictionary.W_dec[differing] / dictionary.input_scale
        )
        self._column = {feature: column for column, feature in enumerate(self.differing)}

    def effects(self, sets: Sequence[Sequence[int]]) -> list[Effect]:
        """Of patching each set; features that never differ may be among them."""
        return self.bench.effects(torch.stack([self._delta(chosen) for chosen in sets]))

    def changed(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """How many of each set's features differ on a prompt, mean over the prompts."""
        differs = (self.change != 0).any(dim=1).float()
        return [differs[:, self._columns(chosen)].sum(dim=1).mean().item() for chosen in sets]

    def by_attribution(self, steps: int) -> list[int]:
        """The features that differ, those first that lower the KL most, to first order.

        The gradient is the mean of those at `steps` points of the way from the base to all patched (integrated
        gradients, as in arXiv 2403.19647): one run backward for all features.
        """
        whole = self._delta(self.differing)
        gradient = torch.zeros_like(whole)
        for step in range(steps):
            share = (step + 0.5) / steps
            gradient += self._gradient(self.bench.rest.x + share * whole) / steps
        effect = ((gradient @ self.decoder.T) * self.change).sum(dim=(0, 1))
        return [self.differing[column] for column in effect.argsort().tolist()]

    def _gradient(self, x: Tensor) -> Tensor:
        """Of the mean KL, in x."""
        parts = []
        at_once = max(1, _TOKENS_AT_ONCE // x.shape[1])
        for prompts in torch.arange(len(x)).split(at_once):
            here = x[prompts].requires_grad_()
            found = self.bench.rest.log_probabilities(here, prompts)
            total = kl(found, self.bench.counterfactual[prompts]).sum() / len(x)
            parts.append(torch.autograd.grad(total, here)[0])
            self.bench.calls += 1
            self.bench.forwards += len(prompts)
        return torch.cat(parts)

    def _delta(self, chosen: Sequence[int]) -> Float[Tensor, "prompts positions d_model"]:
        columns = self._columns(chosen)
        return self.change[..., columns] @ self.decoder[columns]

    def _columns(self, chosen: Sequence[int]) -> list[int]:
        return [self._column[feature] for feature in chosen if feature in self._column]


def kl(
    p: Float[Tensor, "rows vocabulary"], q: Float[Tensor, "rows vocabulary"]
) -> Float[Tensor, " rows"]:
    """KL(p || q) in nats, of log-probabilities."""
    return (p.exp() * (p - q)).sum(dim=-1)


def _padded(sequences: Sequence[Sequence[int]]) -> Int[Tensor, "sequences positions"]:
    rows = [torch.tensor(sequence) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
