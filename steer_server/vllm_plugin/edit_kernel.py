"""The edits of one site as one Triton launch: a program per batch row, nothing decided on the host.

All tables keep their addresses and only change their contents, so a captured CUDA graph stays valid. Tensors are
float32 and contiguous unless said otherwise.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# (Triton's language is not Python to a type checker.)

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from steer_server.errors import UnsupportedVllm

READ_BEFORE, READ_AFTER = 1, 2
"""Bits of `row_read`."""
MAX_D_MODEL = 16384


class Bank(NamedTuple):
    """The features that some request edits or watches at the site, a slot each."""

    encoder: Tensor
    """[slots, d_model]"""
    bias: Tensor
    """[slots]"""
    threshold: Tensor
    """[slots]; f = z where z > threshold, else 0."""
    decoder: Tensor
    """[slots, d_model]"""
    decoder_norm: Tensor
    """[slots]"""


class Lines(NamedTuple):
    """What a row may be told to do; line 0 has no entries and is the exact no-op."""

    counts: Tensor
    """[lines] int32: entries of the line."""
    slot: Tensor
    """[lines, entries] int32"""
    gain: Tensor
    """[lines, entries], as the four below."""
    offset: Tensor
    share: Tensor
    low: Tensor
    high: Tensor
    when_slot: Tensor
    """[lines, entries] int32: the feature whose activation must exceed `when_above`."""
    when_above: Tensor
    """[lines, entries]; -inf: always."""
    most: Tensor
    """[lines]: the delta is scaled down to so many lengths of x."""
    refused: Tensor
    """[lines]: past so many the row is left as it was."""


class Outcome(NamedTuple):
    """What the edits did; a row is written only where its line or its read bits say so."""

    change: Tensor
    """[max_rows, entries]: f' - f; past the line's entries, left as it was."""
    x_norm: Tensor
    """[max_rows]: |x|."""
    size: Tensor
    """[max_rows]: |delta| before it was scaled down."""
    applied: Tensor
    """[max_rows] int32: 0 for rows left as they were because the delta was too large."""
    x_before: Tensor
    """[max_rows, d_model], where READ_BEFORE is set."""
    x_after: Tensor
    """[max_rows, d_model], where READ_AFTER is set: what the next layer reads."""


def edit_rows(
    hidden: Tensor,
    residual: Tensor | None,
    bank: Bank,
    lines: Lines,
    row_line: Tensor,
    row_read: Tensor,
    out: Outcome,
) -> None:
    """Edits x = hidden + residual in place in `hidden`, [rows, d_model] in float32, bfloat16 or float16.

    The grid is the padded row count, and `row_line` and `row_read`, [max_rows] int32, say what each row is for:
    rows with line 0 and no read bit are neither read nor written.
    """
    n_rows, d_model = hidden.shape
    for tensor in (hidden, residual):
        if tensor is not None and (tensor.shape != hidden.shape or tensor.stride(1) != 1):
            raise UnsupportedVllm(
                f"the model's hidden states have shape {tuple(tensor.shape)} and strides {tensor.stride()};"
                f" the edit kernel needs {tuple(hidden.shape)} with adjacent columns"
            )
    assert d_model == bank.encoder.shape[1] <= MAX_D_MODEL
    assert n_rows <= row_line.shape[0]
    if n_rows == 0:
        return
    block = triton.next_power_of_2(d_model)
    _edit_row[(n_rows,)](
        hidden,
        residual,
        *bank,
        *lines,
        row_line,
        row_read,
        *out,
        hidden.stride(0),
        residual.stride(0) if residual is not None else 0,
        D=d_model,
        ENTRIES=lines.slot.shape[1],
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        # 64 registers a thread for a tile of encoder rows; whole lines of up to 8 entries in one pass.
        TILE=min(8, max(1, MAX_D_MODEL // block)),
        num_warps=max(4, block // 512),
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize_on_alignment=["row_line", "row_read"])
def _edit_row(
    hidden,
    residual,
    encoder,
    bias,
    threshold,
    decoder,
    decoder_norm,
    line_count,
    line_slot,
    line_gain,
    line_offset,
    line_share,
    line_low,
    line_high,
    line_when_slot,
    line_when_above,
    line_most,
    line_refused,
    row_line,
    row_read,
    out_change,
    out_x_norm,
    out_size,
    out_applied,
    out_before,
    out_after,
    hidden_stride,
    residual_stride,
    D: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(row_line + row)
    read = tl.load(row_read + row)
    if (line | read) == 0:
        return
    count = tl.load(line_count + line)
    column = tl.arange(0, BLOCK)
    inside = column < D
    target = hidden + row * hidden_stride + column
    h = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    if HAS_RESIDUAL:
        other = residual + row * residual_stride + column
        r = tl.load(other, mask=inside, other=0.0).to(tl.float32)
    x = h + r
    if (read & 1) != 0:
        tl.store(out_before + row * D + column, x, mask=inside)
    x_after = x
    if count > 0:
        x_norm = tl.sqrt_rn(tl.sum(x * x, axis=0))
        delta = tl.zeros([BLOCK], tl.float32)
        changed = 0
        for first in range(0, count, TILE):
            entry = first + tl.arange(0, TILE)
            live = entry < count
            at = line * ENTRIES + entry
            slot = tl.load(line_slot + at, mask=live, other=0).to(tl.int64)
            f = _activations(x, slot, live, encoder, bias, threshold, column, D)
            share = tl.load(line_share + at, mask=live, other=0.0)
            norm = tl.load(decoder_norm + slot, mask=live, other=1.0)
            low = tl.load(line_low + at, mask=live, other=float("-inf"))
            high = tl.load(line_high + at, mask=live, other=float("inf"))
            change = tl.load(line_gain + at, mask=live, other=0.0) * f
            change += tl.load(line_offset + at, mask=live, other=0.0)
            # A dead decoder row has norm 0: without the condition its 0 / 0 would spread.
            change += tl.where(share != 0.0, share * tl.div_rn(x_norm, norm), 0.0)
            change += tl.minimum(tl.maximum(f, low), high) - f
            above = tl.load(line_when_above + at, mask=live, other=float("-inf"))
            if tl.max(above, axis=0) > float("-inf"):
                asked = live & (above > float("-inf"))
                when = tl.load(line_when_slot + at, mask=asked, other=0).to(tl.int64)
                g = _activations(x, when, asked, encoder, bias, threshold, column, D)
                change = tl.where(asked & ~(g > above), 0.0, change)
            tl.store(out_change + row * ENTRIES + entry, change, mask=live)
            moves = live & (change != 0.0)
            changed += tl.sum(moves.to(tl.int32), axis=0)
            rows = tl.load(
                decoder + slot[:, None] * D + column[None, :],
                mask=moves[:, None] & inside[None, :],
                other=0.0,
            )
            delta += tl.sum(tl.where(moves, change, 0.0)[:, None] * rows, axis=0)
        size = tl.sqrt_rn(tl.sum(delta * delta, axis=0))
        tl.store(out_size + row, size)
        most = tl.load(line_most + line) * x_norm
        # Infinitely many lengths of an x of length 0 are NaN, which nothing exceeds.
        if size > most:
            scale = tl.div_rn(most, size)
            delta *= scale
            size *= scale
        exact = h + delta
        rounded = _rounded(exact, hidden.dtype.element_ty)
        after = rounded.to(tl.float32)
        finite = (tl.abs(exact) < float("inf")) & (tl.abs(after) < float("inf"))
        held = size <= tl.load(line_refused + line) * x_norm
        applied = held & (tl.min(finite.to(tl.int32), axis=0) == 1)
        tl.store(out_x_norm + row, x_norm)
        tl.store(out_applied + row, applied.to(tl.int32))
        # Adding zeros would turn -0 into 0: a line that changes nothing writes nothing.
        if applied & (changed > 0):
            tl.store(target, rounded, mask=inside)
            x_after = after + r
    if (read & 2) != 0:
        tl.store(out_after + row * D + column, x_after, mask=inside)


@triton.jit
def _activations(x, slot, live, encoder, bias, threshold, column, D: tl.constexpr):
    """f of the slots, [TILE]; 0 where not live."""
    mask = live[:, None] & (column < D)[None, :]
    rows = tl.load(encoder + slot[:, None] * D + column[None, :], mask=mask, other=0.0)
    z = tl.sum(rows * x[None, :], axis=1) + tl.load(bias + slot, mask=live, other=0.0)
    return tl.where(z > tl.load(threshold + slot, mask=live, other=float("inf")), z, 0.0)


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """`value` in `dtype`, to the nearest, ties to even.

    By hand for bfloat16, in the one way that holds everywhere: Triton's interpreter cuts the low bits off. A NaN may
    become anything.
    """
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
