"""The active features of a batch, and the products with them that a gradient is made of.

A dictionary's exact gradient has no part where a feature is inactive. A step's floor therefore is the encoder's
product, 2 F D flop per token, and about 8 D flop for each active feature of a token, while autograd makes five products
of full width. `Sparse` touches active features only; `Dense` is the same arithmetic at full width, which wins where
many are active. All tensors have a leading dimension of members: dictionaries of one shape that train together.
"""

import warnings
from typing import Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

with warnings.catch_warnings():
    # torch warns of its CSR tensors with the first of a process.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

SPARSE_SHARE = 1 / 20
"""Of features active at a token below which products over the active ones are faster on a CPU."""


class Active(Protocol):
    """f, [members, tokens, features], by its entries; or other numbers in the same places."""

    values: Tensor
    """The entries; of full width, 0 between them, if it is dense."""

    def like(self, values: Tensor) -> Self:
        """Other entries in the same places."""
        ...

    def of_member(self, numbers: Float[Tensor, " members"]) -> Tensor:
        """What each entry's member has in `numbers`; broadcasts against `values`."""
        ...

    def of_feature(self, numbers: Float[Tensor, "members features"]) -> Tensor:
        """What each entry's feature has in `numbers`; broadcasts against `values`."""
        ...

    def decode(self, W: Float[Tensor, "members features d"]) -> Float[Tensor, "members tokens d"]:
        """f W."""
        ...

    def pull(
        self, g: Float[Tensor, "members tokens d"], W: Float[Tensor, "members features d"]
    ) -> Self:
        """g W^T in the same places."""
        ...

    def transposed(
        self, g: Float[Tensor, "members tokens d"]
    ) -> Float[Tensor, "members features d"]:
        """f^T g."""
        ...

    def sum_tokens(self) -> Float[Tensor, "members features"]: ...

    def count(self) -> Float[Tensor, " members"]:
        """How many entries each member has."""
        ...

    def fired(self) -> Tensor:
        """Whether each feature has an entry, [members, features]."""
        ...


def at(mask: Tensor, values: Tensor) -> Active:
    """The entries of `values` where `mask` is true, in the faster of the two forms."""
    count = int(torch.count_nonzero(mask))
    if mask.is_cuda or count > SPARSE_SHARE * mask.numel():
        return Dense(torch.where(mask, values, 0.0), mask)
    return Sparse.at(mask, values)


class Dense:
    """At full width."""

    def __init__(self, values: Tensor, mask: Tensor) -> None:
        self.values = values
        self._mask = mask

    def like(self, values: Tensor) -> Self:
        return type(self)(torch.where(self._mask, values, 0.0), self._mask)

    def of_member(self, numbers: Tensor) -> Tensor:
        return numbers[:, None, None]

    def of_feature(self, numbers: Tensor) -> Tensor:
        return numbers[:, None, :]

    def decode(self, W: Tensor) -> Tensor:
        return self.values @ W

    def pull(self, g: Tensor, W: Tensor) -> Self:
        return self.like(g @ W.mT)

    def transposed(self, g: Tensor) -> Tensor:
        return self.values.mT @ g

    def sum_tokens(self) -> Tensor:
        return self.values.sum(dim=1)

    def count(self) -> Tensor:
        return self._mask.sum(dim=(1, 2)).to(self.values.dtype)

    def fired(self) -> Tensor:
        return self._mask.any(dim=1)


class Sparse:
    """By token, in the compressed form of torch's CSR tensors; members one after the other."""

    def __init__(self, places: "_Places", values: Tensor) -> None:
        self._places = places
        self.values = values

    @classmethod
    def at(cls, mask: Tensor, values: Tensor) -> Self:
        places = _Places(mask)
        return cls(places, values.reshape(-1)[places.flat])

    def like(self, values: Tensor) -> Self:
        return type(self)(self._places, values)

    def of_member(self, numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(self._places.counts)

    def of_feature(self, numbers: Tensor) -> Tensor:
        return numbers.reshape(-1)[self._places.feature_of_all]

    def decode(self, W: Tensor) -> Tensor:
        parts = self._places.by_token(self.values)
        return torch.stack([part @ own for part, own in zip(parts, W, strict=True)])

    def pull(self, g: Tensor, W: Tensor) -> Self:
        parts = self._places.by_token(self.values)
        found = [
            torch.sparse.sampled_addmm(part, left, right.mT, beta=0.0).values()
            for part, left, right in zip(parts, g, W, strict=True)
        ]
        return self.like(torch.cat(found))

    def transposed(self, g: Tensor) -> Tensor:
        parts = self._places.by_feature(self.values)
        return torch.stack([part @ own for part, own in zip(parts, g, strict=True)])

    def sum_tokens(self) -> Tensor:
        members, _, features = self._places.shape
        total = self.values.new_zeros(members * features)
        return total.index_add_(0, self._places.feature_of_all, self.values).view(members, features)

    def count(self) -> Tensor:
        return self._places.counts.to(self.values.dtype)

    def fired(self) -> Tensor:
        members, _, features = self._places.shape
        fired = torch.zeros(members * features, dtype=torch.bool)
        fired[self._places.feature_of_all] = True
        return fired.view(members, features)


class _Places:
    """Where entries are, and the orders in which products want them."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = members, tokens, features = mask.shape
        self.flat = mask.reshape(-1).nonzero().squeeze(1)
        row = self.flat // features
        self._feature = self.flat - row * features
        per_row = torch.bincount(row, minlength=members * tokens).view(members, tokens)
        self.counts = per_row.sum(dim=1)
        self._row_ends = torch.nn.functional.pad(per_row.cumsum(dim=1), (1, 0))
        self._ends = [0, *self.counts.cumsum(0).tolist()]
        member = row // tokens
        self._token = row - member * tokens
        self.feature_of_all = member * features + self._feature
        self._order: Tensor | None = None

    def by_token(self, values: Tensor) -> list[Tensor]:
        """[tokens, features] for each member."""
        _, tokens, features = self.shape
        return [
            torch.sparse_csr_tensor(
                ends, self._feature[part], values[part], (tokens, features), check_invariants=False
            )
            for ends, part in zip(self._row_ends, self._parts(), strict=True)
        ]

    def by_feature(self, values: Tensor) -> list[Tensor]:
        """[features, tokens] for each member, in the layout that has a fast product."""
        members, tokens, features = self.shape
        if self._order is None:
            self._order = self.feature_of_all.argsort(stable=True)
            counts = torch.bincount(self.feature_of_all, minlength=members * features)
            ends = counts.view(members, features).cumsum(dim=1)
            self._feature_ends = torch.nn.functional.pad(ends, (1, 0))
            self._token_by_feature = self._token[self._order]
        ordered = values[self._order]
        return [
            torch.sparse_csr_tensor(
                ends,
                self._token_by_feature[part],
                ordered[part],
                (features, tokens),
                check_invariants=False,
            )
            for ends, part in zip(self._feature_ends, self._parts(), strict=True)
        ]

    def _parts(self) -> list[slice]:
        return [slice(first, last) for first, last in zip(self._ends, self._ends[1:], strict=False)]
