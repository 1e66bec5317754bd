"""The active features of a batch, and the products with them that a gradient is made of.

A dictionary's exact gradient has no part where a feature is inactive. A step's floor therefore is the encoder's
product, 2 F D flop per token, and about 8 D flop for each active feature of a token, while autograd makes five products
of full width. `Sparse` touches active features only; `Dense` is the same arithmetic at full width, which wins where
many are active. All tensors have a leading dimension of members: dictionaries of one shape that train together.
"""

import warnings
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from trainer.config import Precision
from trainer.product import product
from trainer.selection import nonzero, nth_largest

with warnings.catch_warnings():
    # torch warns of its CSR tensors with the first of a process.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

SPARSE_SHARE = 1 / 10
"""Of features active at a token below which products over the active ones are faster on a CPU."""
CUDA_SHARES: dict[Precision, float] = {"float32": 1 / 32, "bfloat16": 1 / 256}
"""The same on a GPU, reckoned for an H100 from its data sheet: 2 * bandwidth of the L2 / (bytes of a number * FLOP/s).
`benchmarks/trainer_kernels.py` measures them."""


class Active(Protocol):
    """f, [members, tokens, features], by its entries; or other numbers in the same places."""

    values: Tensor
    """The entries; of full width, 0 between them, if it is dense."""

    def like(self, values: Tensor) -> Self:
        """Other entries in the same places; takes `values` over."""
        ...

    def only(self, keep: Tensor) -> Self:
        """Without the entries for which `keep`, of the shape of `values`, is false."""
        ...

    def columns(self, first: int, last: int) -> Self:
        """The features from `first` to before `last`."""
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
        self,
        g: Float[Tensor, "members tokens d"],
        W: Float[Tensor, "members features d"],
        plus: Tensor | None = None,
    ) -> Self:
        """g W^T in the same places, with what `of_member` or `of_feature` gave added."""
        ...

    def transposed(
        self, g: Float[Tensor, "*members tokens d"]
    ) -> Float[Tensor, "members features d"]:
        """f^T g, where g may be one for all members."""
        ...

    def sum_tokens(self) -> Float[Tensor, "members features"]: ...

    def count(self) -> Float[Tensor, " members"]:
        """How many entries each member has."""
        ...

    def nth_largest(self, ranks: Sequence[int]) -> Float[Tensor, " members"]:
        """Of each member's entries the one of that rank; 0 where it has fewer."""
        ...

    def fired(self) -> Tensor:
        """Whether each feature has an entry, [members, features]."""
        ...


def at(
    mask: Bool[Tensor, "members tokens features"],
    values: Tensor,
    precision: Precision = "float32",
    most: int | None = None,
) -> Active:
    """The entries of `values` where `mask` is true, in the fastest form.

    `most` is how many there can be, if that is known: a GPU then need not be asked, and waited for.
    """
    if most is None or not mask.is_cuda:
        most = int(torch.count_nonzero(mask))
    share = CUDA_SHARES[precision] if mask.is_cuda else SPARSE_SHARE
    if most > share * mask.numel():
        return Dense(torch.where(mask, values, 0.0), mask, precision)
    if mask.is_cuda:
        # Triton comes with torch's CUDA builds only.
        from trainer.active_cuda import Compressed

        return Compressed.at(mask, values, most, precision)
    flat = nonzero(mask)
    return Sparse(_Places(flat, mask.shape), values.reshape(-1).index_select(0, flat))


def at_columns(
    columns: Int[Tensor, "members tokens k"],
    keep: Tensor,
    values: Tensor,
    precision: Precision = "float32",
) -> Active:
    """The entries of `values` in those columns of each token, none of them twice, where `keep` is true."""
    features = values.shape[2]
    if values.is_cuda or columns.shape[2] > SPARSE_SHARE * features:
        mask = torch.zeros_like(values, dtype=torch.bool).scatter_(2, columns, keep)
        if values.is_cuda:
            return at(mask, values, precision, columns.numel())
        return Dense(torch.where(mask, values, 0.0), mask, precision)
    starts = torch.arange(0, values.numel(), features).view(*columns.shape[:2], 1)
    flat = (columns + starts)[keep]
    return Sparse(_Places(flat, values.shape), values.reshape(-1).index_select(0, flat))


class Dense:
    """At full width."""

    def __init__(self, values: Tensor, mask: Tensor, precision: Precision = "float32") -> None:
        self.values = values
        self._mask = mask
        self._precision: Precision = precision

    def like(self, values: Tensor) -> Self:
        values.masked_fill_(~self._mask, 0.0)
        return type(self)(values, self._mask, self._precision)

    def only(self, keep: Tensor) -> Self:
        mask = self._mask & keep
        return type(self)(torch.where(mask, self.values, 0.0), mask, self._precision)

    def columns(self, first: int, last: int) -> Self:
        part = slice(first, last)
        return type(self)(self.values[:, :, part], self._mask[:, :, part], self._precision)

    def of_member(self, numbers: Tensor) -> Tensor:
        return numbers[:, None, None]

    def of_feature(self, numbers: Tensor) -> Tensor:
        return numbers[:, None, :]

    def decode(self, W: Tensor) -> Tensor:
        return product(self.values, W, self._precision)

    def pull(self, g: Tensor, W: Tensor, plus: Tensor | None = None) -> Self:
        values = product(g, W.mT, self._precision)
        return self.like(values if plus is None else values.add_(plus))

    def transposed(self, g: Tensor) -> Tensor:
        g = g.expand(len(self.values), -1, -1)
        return product(self.values.mT, g, self._precision)

    def sum_tokens(self) -> Tensor:
        return self.values.sum(dim=1)

    def count(self) -> Tensor:
        return torch.stack([torch.count_nonzero(own) for own in self._mask]).to(self.values.dtype)

    def nth_largest(self, ranks: Sequence[int]) -> Tensor:
        return nth_largest([v[m] for v, m in zip(self.values, self._mask, strict=True)], ranks)

    def fired(self) -> Tensor:
        return self._mask.any(dim=1)


class Sparse:
    """By token, members one after the other.

    Products with rows of a matrix are bags of an embedding, torch's fastest on a CPU, with the same sums whatever the
    number of threads. They are in float32 whatever the precision.
    """

    def __init__(self, places: "_Places", values: Tensor) -> None:
        self._places = places
        self.values = values

    def like(self, values: Tensor) -> Self:
        return type(self)(self._places, values)

    def only(self, keep: Tensor) -> Self:
        if keep.all():
            return self
        places = _Places(self._places.flat[keep], self._places.shape)
        return type(self)(places, self.values[keep])

    def columns(self, first: int, last: int) -> Self:
        members, tokens, features = self._places.shape
        column = self._places.flat % features
        keep = (column >= first) & (column < last)
        width = last - first
        flat = self._places.row[keep] * width + column[keep] - first
        return type(self)(_Places(flat, (members, tokens, width)), self.values[keep])

    def of_member(self, numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(self._places.counts)

    def of_feature(self, numbers: Tensor) -> Tensor:
        return numbers.reshape(-1).index_select(0, self._places.feature)

    def decode(self, W: Tensor) -> Tensor:
        members, tokens, _ = self._places.shape
        starts = self._places.row_ends[:-1]
        found = _bags(W.flatten(0, 1), self._places.feature, starts, self.values)
        return found.view(members, tokens, -1)

    def pull(self, g: Tensor, W: Tensor, plus: Tensor | None = None) -> Self:
        members, tokens, features = self._places.shape
        # Members stand along the diagonal of one matrix.
        pattern = torch.sparse_csr_tensor(
            self._places.row_ends,
            self._places.feature,
            self.values,
            (members * tokens, members * features),
            check_invariants=False,
        )
        left, right = g.flatten(0, 1), W.flatten(0, 1).mT
        values = torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()
        return self.like(values if plus is None else values.add_(plus))

    def transposed(self, g: Tensor) -> Tensor:
        members, tokens, features = self._places.shape
        order, starts = self._places.by_feature
        row = self._places.row if g.ndim == 3 else self._places.row % tokens
        values = self.values.index_select(0, order)
        found = _bags(g.reshape(-1, g.shape[-1]), row.index_select(0, order), starts, values)
        return found.view(members, features, -1)

    def sum_tokens(self) -> Tensor:
        members, _, features = self._places.shape
        total = self.values.new_zeros(members * features)
        return total.index_add_(0, self._places.feature, self.values).view(members, features)

    def count(self) -> Tensor:
        return self._places.counts.to(self.values.dtype)

    def nth_largest(self, ranks: Sequence[int]) -> Tensor:
        return nth_largest(self.values.split(self._places.counts.tolist()), ranks)

    def fired(self) -> Tensor:
        members, _, features = self._places.shape
        fired = torch.zeros(members * features, dtype=torch.bool)
        fired[self._places.feature] = True
        return fired.view(members, features)


class _Places:
    """Where entries are, and the orders in which products want them."""

    def __init__(self, flat: Int[Tensor, " entries"], shape: tuple[int, ...]) -> None:
        """`flat` counts through [members, tokens, features] and ascends by token."""
        self.flat = flat
        self.shape = members, tokens, features = shape
        self.row = flat // features
        """member x tokens + token."""
        self.feature = flat - (self.row - self.row // tokens) * features
        """member x features + feature."""
        per_row = torch.bincount(self.row, minlength=members * tokens)
        self.row_ends = pad(per_row.cumsum(dim=0), (1, 0))
        self.counts = per_row.view(members, tokens).sum(dim=1)
        self._by_feature: tuple[Tensor, Tensor] | None = None

    @property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """The order in which entries ascend by feature, and where in it each feature begins."""
        if self._by_feature is None:
            members, _, features = self.shape
            counts = torch.bincount(self.feature, minlength=members * features)
            order = self.feature.int().argsort(stable=True)
            self._by_feature = order, counts.cumsum(dim=0) - counts
        return self._by_feature


def _bags(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights_i table[rows_i] over each bag."""
    return embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)
