"""Edits of features, and the one arithmetic that applies them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary, FeatureRows
from steer_server.errors import ConflictingEdits, UnknownFeature


@dataclass(frozen=True)
class Ablate:
    """The feature's activation becomes 0."""

    feature: int


@dataclass(frozen=True)
class Clamp:
    """The feature's activation becomes `value`, whatever it was."""

    feature: int
    value: float


@dataclass(frozen=True)
class Scale:
    """The feature's activation is multiplied by `factor`."""

    feature: int
    factor: float


@dataclass(frozen=True)
class Add:
    """`value` is added to the feature's activation."""

    feature: int
    value: float


@dataclass(frozen=True)
class AddRelative:
    """The feature's direction is added with `share` times the norm of x as its length."""

    feature: int
    share: float


Edit = Ablate | Clamp | Scale | Add | AddRelative


class Coefficients(NamedTuple):
    """Edits as numbers: `f' - f = gain f + offset + share |x| / |decoder row|`."""

    gain: float
    offset: float
    share: float


def coefficients(edit: Edit) -> Coefficients:
    """The affine form of `edit`."""
    match edit:
        case Ablate():
            return Coefficients(-1.0, 0.0, 0.0)
        case Clamp(_, value):
            return Coefficients(-1.0, value, 0.0)
        case Scale(_, factor):
            return Coefficients(factor - 1.0, 0.0, 0.0)
        case Add(_, value):
            return Coefficients(0.0, value, 0.0)
        case AddRelative(_, share):
            return Coefficients(0.0, 0.0, share)


def activation_change(
    x: Float[Tensor, "tokens d_model"],
    x_norm: Float[Tensor, "tokens 1"],
    rows: FeatureRows,
    gain: Float[Tensor, "*tokens features"],
    offset: Float[Tensor, "*tokens features"],
    share: Float[Tensor, "*tokens features"],
) -> Float[Tensor, "tokens features"]:
    """`f' - f` of the edited features; the coefficients may differ from token to token.

    A feature with zero coefficients at a token changes by exactly 0 there.
    """
    return gain * rows.encode(x) + offset + share * (x_norm / rows.decoder.norm(dim=-1))


def edit_delta(
    dictionary: Dictionary, x: Float[Tensor, "tokens d_model"], edits: Sequence[Edit]
) -> Float[Tensor, "tokens d_model"]:
    """What to add to `x` so that each edited feature takes its target activation.

    All activations come from the unedited `x`. Only the edited features move; the rest of `x`,
    error term included, stays as it was.
    """
    check_edits(edits, dictionary.n_features)
    if not edits:
        return torch.zeros_like(x)
    rows = dictionary.rows.take(torch.tensor([edit.feature for edit in edits]))
    table = x.new_tensor([coefficients(edit) for edit in edits])
    x_norm = x.norm(dim=-1, keepdim=True)
    change = activation_change(x, x_norm, rows, table[:, 0], table[:, 1], table[:, 2])
    return change @ rows.decoder


def check_edits(edits: Sequence[Edit], n_features: int) -> None:
    """Each edit names a feature of the dictionary, and no two the same one."""
    seen: dict[int, int] = {}
    for position, edit in enumerate(edits):
        field = f"edits[{position}].feature"
        if not 0 <= edit.feature < n_features:
            raise UnknownFeature(
                f"feature {edit.feature} is not in 0..{n_features - 1}", field=field
            )
        if edit.feature in seen:
            raise ConflictingEdits(
                f"feature {edit.feature} is already edited by edits[{seen[edit.feature]}]; "
                "name each feature once",
                field=field,
            )
        seen[edit.feature] = position
