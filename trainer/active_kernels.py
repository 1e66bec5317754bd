"""Triton kernels for products over active features, as operators of their own, so that a step can be traced without a GPU.

Sums run in one order, entry after entry of a row or of a feature, without atomics: equal inputs give equal bits.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# (Triton's language is not Python to a type checker.)

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES, _COLUMNS = 32, 128
"""Of a tile: 32 registers a thread, and a feature that is active at 4096 tokens takes 128 tiles, not one for each token."""


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
