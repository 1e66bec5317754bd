"""`Active` on CUDA: entries in compressed rows, and the products with them as Triton kernels.

The buffers' length is fixed beforehand, so that the host never waits to learn how many entries there are. Sums run in
one order, entry after entry of a row or of a feature, without atomics: equal inputs give equal bits.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# (Triton's language is not Python to a type checker.)

from collections.abc import Sequence
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.config import Precision
from trainer.product import rounded

_ENTRIES, _COLUMNS = 32, 128
"""Of a tile: 32 registers a thread, and a feature that is active at 4096 tokens takes 128 tiles, not one for each token."""


class Compressed:
    """By token, members one after the other; past the last entry, `values` may be anything."""

    def __init__(self, places: "_Places", values: Tensor, precision: Precision) -> None:
        self._places = places
        self._precision: Precision = precision
        self.values = values

    @classmethod
    def at(cls, mask: Tensor, values: Tensor, most: int, precision: Precision = "float32") -> Self:
        """With room for `most` entries; if there are more, all of them become NaN."""
        places, entries = _Places.of(mask, values, most)
        return cls(places, entries, precision)

    def like(self, values: Tensor) -> Self:
        return type(self)(self._places, values, self._precision)

    def only(self, keep: Tensor) -> Self:
        places, values = self._places.only(keep, self.values)
        return type(self)(places, values, self._precision)

    def columns(self, first: int, last: int) -> Self:
        *_, features = self._places.shape
        column = self._places.key % features
        places, values = self._places.only((column >= first) & (column < last), self.values)
        return type(self)(places.narrowed(first, last), values, self._precision)

    def of_member(self, numbers: Tensor) -> Tensor:
        *_, features = self._places.shape
        return torch.nn.functional.pad(numbers, (0, 1)).index_select(
            0, self._places.key // features
        )

    def of_feature(self, numbers: Tensor) -> Tensor:
        return torch.nn.functional.pad(numbers.reshape(-1), (0, 1)).index_select(
            0, self._places.key
        )

    def decode(self, W: Tensor) -> Tensor:
        places = self._places
        return weighted_sum(self.values, places.key, None, places.ends, rounded(W, self._precision))

    def pull(self, g: Tensor, W: Tensor, plus: Tensor | None = None) -> Self:
        g, W = rounded(g, self._precision), rounded(W, self._precision)
        values = dot(self._places.key, self._places.ends, g, W)
        return self.like(values if plus is None else values + plus)

    def transposed(self, g: Tensor) -> Tensor:
        members, _, _ = self._places.shape
        order, ends = self._places.by_feature()
        g = rounded(g.expand(members, -1, -1), self._precision)
        return weighted_sum(self.values, self._places.row, order, ends, g)

    def sum_tokens(self) -> Tensor:
        members, tokens, _ = self._places.shape
        return self.transposed(self.values.new_ones(1).expand(members, tokens, 1)).squeeze(2)

    def count(self) -> Tensor:
        _, tokens, _ = self._places.shape
        return self._places.ends[::tokens].diff().to(self.values.dtype)

    def nth_largest(self, ranks: Sequence[int]) -> Tensor:
        member = self.of_member(torch.arange(len(ranks), device=self.values.device) + 1) - 1
        found = [
            self.values.masked_fill(member != number, float("-inf"))
            .topk(min(rank, len(self.values)), sorted=False)
            .values.min()
            for number, rank in enumerate(ranks)
        ]
        enough = [count >= rank for count, rank in zip(self.count(), ranks, strict=True)]
        return torch.where(torch.stack(enough), torch.stack(found), 0.0)

    def fired(self) -> Tensor:
        members, _, features = self._places.shape
        _, ends = self._places.by_feature()
        return (ends.diff() > 0).view(members, features)


class _Places:
    """Where entries are, and the order by feature that the transposed product wants."""

    def __init__(self, shape: torch.Size, ends: Tensor, key: Tensor, row: Tensor) -> None:
        self.shape = shape
        self.ends = ends
        """[members * tokens + 1]: where each row ends."""
        self.key = key
        """Of each entry member * features + feature; past the last, members * features."""
        self.row = row
        """Of each entry member * tokens + token."""
        self._by_feature: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, mask: Tensor, values: Tensor, most: int) -> tuple[Self, Tensor]:
        assert mask.numel() < 2**31
        ends = mask.sum(dim=2, dtype=torch.int32).flatten().cumsum(0, dtype=torch.int32)
        ends = torch.nn.functional.pad(ends, (1, 0))
        key, row, entries = compress(mask, values, ends, max(1, min(most, mask.numel())))
        return cls(mask.shape, ends, key, row), entries

    def only(self, keep: Tensor, values: Tensor) -> tuple[Self, Tensor]:
        """The places where `keep` is true, and `values` there; if not all had room, all of them as they are."""
        room = len(self.key)
        live = torch.arange(room, device=keep.device) < self.ends[-1]
        keep = live & (keep | (self.ends[-1] > room))
        before = torch.nn.functional.pad(keep.cumsum(0, dtype=torch.int32), (1, 0))
        # What is left out goes to a place past the end.
        place = torch.where(keep, before[:-1], room).long()

        def kept(part: Tensor, rest: int) -> Tensor:
            return part.new_full((room + 1,), rest).scatter_(0, place, part)[:-1]

        members, _, features = self.shape
        ends = before.index_select(0, self.ends.clamp(max=room))
        ends[-1] = torch.maximum(ends[-1], torch.where(self.ends[-1] > room, self.ends[-1], 0))
        key, row = kept(self.key, members * features), kept(self.row, 0)
        return type(self)(self.shape, ends, key, row), kept(values, 0)

    def narrowed(self, first: int, last: int) -> Self:
        """The same places, all of them in those features, counted from the first."""
        members, tokens, features = self.shape
        width = last - first
        member = self.key // features
        # Entries that had no room are NaN and stay, wherever they are.
        column = (self.key % features).clamp(first, last - 1) - first
        key = torch.where(member < members, member * width + column, members * width)
        return type(self)(torch.Size((members, tokens, width)), self.ends, key, self.row)

    def by_feature(self) -> tuple[Tensor, Tensor]:
        """The entries' order by feature, then token; and where each feature ends, [members * features + 1]."""
        if self._by_feature is None:
            members, _, features = self.shape
            keys, order = self.key.sort(stable=True)
            wanted = torch.arange(members * features + 1, dtype=torch.int32, device=self.key.device)
            self._by_feature = order, torch.searchsorted(keys, wanted, out_int32=True)
        return self._by_feature


# Operators of their own, so that a step can be traced without a GPU.
@torch.library.custom_op("trainer::compress", mutates_args=())
def compress(
    mask: Tensor, values: Tensor, ends: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`key`, `row` and `values` of the entries of `mask`, [members, tokens, features], row after row."""
    members, tokens, features = mask.shape
    mask, values = _rows_evenly_apart(mask), _rows_evenly_apart(values)
    key, row, entries = _room(mask, values, capacity)
    key.fill_(members * features)
    _compress[(members * tokens,)](
        mask.view(torch.uint8),
        values,
        ends,
        key,
        row,
        entries,
        mask.stride(1),
        values.stride(1),
        tokens,
        features,
        members * tokens,
        capacity,
        BLOCK=min(1024, triton.next_power_of_2(features)),
    )
    return key, row, entries


@compress.register_fake
def _(mask: Tensor, values: Tensor, ends: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return _room(mask, values, capacity)


def _room(mask: Tensor, values: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    key, row = (mask.new_zeros(capacity, dtype=torch.int32) for _ in range(2))
    return key, row, values.new_zeros(capacity)


@torch.library.custom_op("trainer::weighted_sum", mutates_args=())
def weighted_sum(
    values: Tensor, index: Tensor, order: Tensor | None, ends: Tensor, source: Tensor
) -> Tensor:
    """Row by row the sum of the rows of `source` that its entries' `index` names, each times its value.

    `source` is [members, rows, d]; `index` counts the rows of all members. The entries of row i are those from
    ends[i] to ends[i + 1], in `order` if there is one.
    """
    members, source_rows, d = source.shape
    source = source if source.stride(2) == 1 or d == 1 else source.contiguous()
    out = _sums(values, ends, source)
    columns = min(_COLUMNS, triton.next_power_of_2(d))
    _weighted_sum[(len(ends) - 1, triton.cdiv(d, columns))](
        values,
        index,
        order,
        ends,
        source,
        out,
        (len(ends) - 1) // members,
        source_rows,
        source.stride(0),
        source.stride(1),
        len(values),
        d,
        HAS_ORDER=order is not None,
        ENTRIES=_ENTRIES,
        COLUMNS=columns,
    )
    return out


@weighted_sum.register_fake
def _(values: Tensor, index: Tensor, order: Tensor | None, ends: Tensor, source: Tensor) -> Tensor:
    return _sums(values, ends, source)


def _sums(values: Tensor, ends: Tensor, source: Tensor) -> Tensor:
    members, _, d = source.shape
    return values.new_empty(members, (len(ends) - 1) // members, d)


@torch.library.custom_op("trainer::dot", mutates_args=())
def dot(key: Tensor, ends: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """Of each entry the product of its row of `g` with its row of `W`."""
    members, tokens, d = g.shape
    g, W = (part if part.stride(2) == 1 else part.contiguous() for part in (g, W))
    out = key.new_zeros(key.shape, dtype=torch.float32)
    _dot[(members * tokens,)](
        key,
        ends,
        g,
        W,
        out,
        tokens,
        W.shape[1],
        g.stride(0),
        g.stride(1),
        W.stride(0),
        W.stride(1),
        len(key),
        d,
        ENTRIES=_ENTRIES,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(d)),
    )
    return out


@dot.register_fake
def _(key: Tensor, ends: Tensor, g: Tensor, W: Tensor) -> Tensor:
    return key.new_zeros(key.shape, dtype=torch.float32)


def _rows_evenly_apart(part: Tensor) -> Tensor:
    """[members, tokens, features] with one stride from row to row through all members."""
    _, tokens, _ = part.shape
    even = part.stride(2) == 1 and part.stride(0) == tokens * part.stride(1)
    return part if even else part.contiguous()


# Not specialized: what changes from step to step must not make Triton compile again.
@triton.jit(do_not_specialize=["capacity"])
def _compress(
    mask,
    values,
    ends,
    out_key,
    out_row,
    out_values,
    mask_stride,
    values_stride,
    tokens,
    features,
    rows,
    capacity,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    first_key = row // tokens * features
    mask_row = mask + row.to(tl.int64) * mask_stride
    values_row = values + row.to(tl.int64) * values_stride
    fits = tl.load(ends + rows) <= capacity
    before = tl.load(ends + row)
    for start in range(0, features, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        inside = feature < features
        on = (tl.load(mask_row + feature, mask=inside, other=0) != 0).to(tl.int32)
        place = before + tl.cumsum(on, axis=0) - 1
        kept = (on != 0) & (place < capacity)
        value = tl.load(values_row + feature, mask=kept, other=0.0)
        # What does not fit must not be lost unseen: NaN reaches the loss.
        tl.store(out_values + place, tl.where(fits, value, float("nan")), mask=kept)
        tl.store(out_key + place, first_key + feature, mask=kept)
        tl.store(out_row + place, tl.full([BLOCK], 0, tl.int32) + row, mask=kept)
        before += tl.sum(on, axis=0)


@triton.jit(do_not_specialize=["capacity"])
def _weighted_sum(
    values,
    index,
    order,
    ends,
    source,
    out,
    rows,
    source_rows,
    member_stride,
    row_stride,
    capacity,
    D,
    HAS_ORDER: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    member = row // rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    own = source + member.to(tl.int64) * member_stride
    last = tl.minimum(tl.load(ends + row + 1), capacity)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(tl.load(ends + row), last, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        live = place < last
        if HAS_ORDER:
            place = tl.load(order + place, mask=live, other=0)
        value = tl.load(values + place, mask=live, other=0.0)
        at = tl.load(index + place, mask=live, other=0) - member * source_rows
        part = tl.load(
            own + at.to(tl.int64)[:, None] * row_stride + column[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(value[:, None] * part.to(tl.float32), axis=0)
    tl.store(out + row.to(tl.int64) * D + column, total, mask=inside)


@triton.jit(do_not_specialize=["capacity"])
def _dot(
    key,
    ends,
    g,
    W,
    out,
    tokens,
    features,
    g_member_stride,
    g_row_stride,
    W_member_stride,
    W_row_stride,
    capacity,
    D,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    member = row // tokens
    token = (row - member * tokens).to(tl.int64)
    g_row = g + member.to(tl.int64) * g_member_stride + token * g_row_stride
    own = W + member.to(tl.int64) * W_member_stride
    last = tl.minimum(tl.load(ends + row + 1), capacity)
    for start in range(tl.load(ends + row), last, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        live = place < last
        feature = tl.load(key + place, mask=live, other=0) - member * features
        W_row = own + feature.to(tl.int64) * W_row_stride
        products = tl.zeros([ENTRIES, COLUMNS], tl.float32)
        for first in range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = column < D
            left = tl.load(g_row + column, mask=inside, other=0.0).to(tl.float32)
            right = tl.load(
                W_row[:, None] + column[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            products += left[None, :] * right.to(tl.float32)
        tl.store(out + place, tl.sum(products, axis=1), mask=live)
