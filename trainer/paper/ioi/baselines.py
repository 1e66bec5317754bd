"""Directions to patch in the place of features: PCA with signs apart, and the names' difference of means."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from steer_server.dictionary.dictionary import Activation, Dictionary
from trainer.paper.ioi.patching import Bench


def signed(rotation: Dictionary) -> Dictionary:
    """Each direction twice, once with either sign, and ReLU: the paper's "non-negative" PCA."""
    W_enc, W_dec = rotation.W_enc, rotation.W_dec
    return Dictionary(
        torch.cat([W_enc, -W_enc], dim=1),
        torch.cat([rotation.b_enc, -rotation.b_enc]),
        torch.cat([W_dec, -W_dec]),
        rotation.b_dec,
        Activation.RELU,
        rotation.input_scale,
        center_input=rotation.center_input,
    )


def diff_mean(bench: Bench) -> Dictionary:
    """Supervised: for each name, from the mean of all names' x, where prompts differ, to its own mean.

    Activations are the coefficients of x's projection on all of them together, for they are not orthogonal.
    """
    rows = torch.arange(len(bench.prompts))
    at = torch.tensor([prompt.at for prompt in bench.prompts])
    x = torch.cat([bench.rest.x[rows, at], bench.counterfactual_x[rows, at]])
    names = [prompt.answer for prompt in bench.prompts] + [p.other for p in bench.prompts]
    return _directions(normalize(_means(x, names) - x.mean(dim=0), dim=1))


def _means(x: Float[Tensor, "rows d_model"], names: Sequence[int]) -> Float[Tensor, "n d_model"]:
    of = torch.tensor(names)
    return torch.stack([x[of == name].mean(dim=0) for name in sorted(set(names))])


def _directions(rows: Float[Tensor, "n d_model"]) -> Dictionary:
    # Where each name comes as often, one direction follows from the others.
    encoder = torch.linalg.pinv(rows.double(), rtol=1e-4).float()
    zeros = torch.zeros(len(rows)), torch.zeros(rows.shape[1])
    return Dictionary(encoder, zeros[0], rows, zeros[1], Activation.IDENTITY)
