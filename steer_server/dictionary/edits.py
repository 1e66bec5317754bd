"""Edits of features, and the one arithmetic that applies them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer_server.dictionary.dictionary import Dictionary
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


@dataclass(frozen=True)
class Limit:
    """The feature's activation is brought into [low, high]; inside it stays to the bit."""

    feature: int
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Patch:
    """At each listed position the feature's activation becomes the value recorded for it."""

    feature: int
    values: tuple[tuple[int, float], ...]
    """(position, activation), each position once; negative ones count from the prompt's end."""

    @cached_property
    def by_position(self) -> dict[int, float]:
        """`values` to look up in, because each row of a prompt does."""
        return dict(self.values)


Edit = Ablate | Clamp | Scale | Add | AddRelative | Limit | Patch


class Coefficients(NamedTuple):
    """Edits as numbers; each may be a tensor that broadcasts against the activations.

    `f' - f = gain f + offset + share |x| / |decoder row| + (min(max(f, low), high) - f)`
    """

    gain: float | Tensor
    offset: float | Tensor
    share: float | Tensor
    low: float | Tensor
    high: float | Tensor


def coefficients(edit: Edit, position: int = 0) -> Coefficients:
    """The affine form of `edit`; a Patch has one per position, which must be one of its own."""
    gain = offset = share = 0.0
    low, high = -math.inf, math.inf
    match edit:
        case Ablate():
            gain = -1.0
        case Clamp(_, value):
            gain, offset = -1.0, value
        case Scale(_, factor):
            gain = factor - 1.0
        case Add(_, value):
            offset = value
        case AddRelative(_, share):
            pass
        case Limit(_, low, high):
            pass
        case Patch():
            gain, offset = -1.0, edit.by_position[position]
    return Coefficients(gain, offset, share, low, high)


def activation_change(
    f: Float[Tensor, "tokens features"] | None,
    x_norm: Float[Tensor, "tokens 1"],
    table: Coefficients,
    *,
    shared: bool = True,
    limited: bool = True,
) -> Float[Tensor, "tokens features"]:
    """`f' - f` of the edited features; the coefficients, all tensors, may differ from token to token.

    Here `table.share` is over the norm of the decoder row. Exactly 0 where the coefficients ask for nothing. `shared`
    is False if no edit has a share, `limited` if none has a finite low or high; `f` may be None if, besides, none has
    a gain.
    """
    if f is None:
        change = table.offset.expand(len(x_norm), -1)  # type: ignore[union-attr]
    else:
        change = torch.addcmul(table.offset, table.gain, f)  # type: ignore[arg-type]
    if shared:
        change = torch.addcmul(change, table.share, x_norm)  # type: ignore[arg-type]
    if limited:
        change = change + (f.clamp(table.low, table.high) - f)  # type: ignore[arg-type]
    return change


def edit_delta(
    dictionary: Dictionary,
    x: Float[Tensor, "tokens d_model"],
    edits: Sequence[Edit],
    positions: Sequence[int] = (),
) -> Float[Tensor, "tokens d_model"]:
    """What to add to `x` so that each edited feature takes its target activation.

    All activations come from the unedited `x`. Only the edited features move; the rest of `x`,
    error term included, stays as it was. `positions` are the tokens'; only a Patch asks for them, and
    leaves tokens at others alone.
    """
    check_edits(edits, dictionary.n_features)
    if not edits:
        return torch.zeros_like(x)
    features = [edit.feature for edit in edits]
    f = dictionary.encode_features(x, features)
    decoder = dictionary.rows.decoder[features]
    table = [[_at(edit, position) for edit in edits] for position in positions or range(len(x))]
    numbers = x.new_tensor(table).reshape(len(x), len(edits), len(Coefficients._fields))
    coefficients = Coefficients(*numbers.unbind(-1))
    coefficients = coefficients._replace(share=coefficients.share / decoder.norm(dim=-1))
    return activation_change(f, x.norm(dim=-1, keepdim=True), coefficients) @ decoder


def _at(edit: Edit, position: int) -> Coefficients:
    if isinstance(edit, Patch) and position not in edit.by_position:
        return coefficients(Add(edit.feature, 0.0))
    return coefficients(edit, position)


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
