"""The strongest features of each row: encode, activation and top-k in one pass over the encoder.

The full-width activations never reach memory. Each program goes through a chunk of the features tile by tile and
keeps the k strongest of its rows as packed keys; a second kernel merges the chunks.

A key is an int64 that orders as the result does: |f|'s bits in the high word, then the inverted feature index, then
the sign. 0 is no feature.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# (Triton's language is not Python to a type checker.)

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_server.vllm_plugin.bitonic import keep_best

MAX_K = 128
Precision = Literal["ieee", "tf32x3", "tf32"]
_BLOCK_N = 128
_FEW_ROWS = 32
_SMALL_K = 32


class TopFeatures(NamedTuple):
    """Per row the k strongest features, largest |f| first, then the lower feature index."""

    features: Tensor
    """[rows, k] int32; -1 past the last."""
    values: Tensor
    """[rows, k] float32: f, which an identity activation may make negative; 0 past the last."""
    active: Tensor
    """[rows] int32: how many features are above their threshold, before `above`."""


def encode_topk(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor,
    k: int,
    above: float = 0.0,
    *,
    rows: Tensor | None = None,
    precision: Precision = "ieee",
    chunks: int | None = None,
) -> TopFeatures:
    """The k strongest of f = z where z = x . encoder + bias is over the threshold, by the Triton kernels.

    `x` is [rows, d_model] and `encoder` [n_features, d_model], in float32 or less; `bias` and `threshold`
    [n_features] in float32. Only |f| > `above` counts. `rows`, int32, picks rows of `x` in place; a negative one is
    padding and gets no feature. With `precision` "tf32" products are exact only for bfloat16 on both sides; "tf32x3"
    is nearly as exact as "ieee". `chunks` splits the features to fill the device; by default as many as it needs.
    """
    n_rows = x.shape[0] if rows is None else rows.shape[0]
    n_features, d_model = encoder.shape
    assert 1 <= k <= MAX_K
    assert above >= 0
    assert x.shape[1] == d_model
    assert x.stride(1) == 1
    assert encoder.is_contiguous()
    top = TopFeatures(
        torch.empty(n_rows, k, dtype=torch.int32, device=x.device),
        torch.empty(n_rows, k, dtype=torch.float32, device=x.device),
        torch.empty(n_rows, dtype=torch.int32, device=x.device),
    )
    if n_rows == 0:
        return top
    # Two widths and two block sizes, because each combination costs seconds to compile when it first runs.
    width = _SMALL_K if k <= _SMALL_K else MAX_K
    block_m = 16 if n_rows <= _FEW_ROWS else 64
    blocks, tiles = triton.cdiv(n_rows, block_m), triton.cdiv(n_features, _BLOCK_N)
    per_chunk = triton.cdiv(tiles, chunks or _chunks(x.device, blocks))
    chunks = triton.cdiv(tiles, per_chunk)
    keys = torch.empty(n_rows, chunks, width, dtype=torch.int64, device=x.device)
    counts = torch.empty(n_rows, chunks, dtype=torch.int32, device=x.device)
    _encode_chunk[(blocks, chunks)](
        x,
        rows,
        encoder,
        bias,
        threshold,
        keys,
        counts,
        n_rows,
        n_features,
        x.stride(0),
        per_chunk * _BLOCK_N,
        float(above),
        D=d_model,
        HAS_ROWS=rows is not None,
        K=width,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=32,
        PRECISION=precision,
        num_warps=8 if block_m == 64 else 4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    _merge_chunks[(n_rows,)](
        keys,
        counts,
        *top,
        chunks,
        k,
        K=width,
        GROUP=1024,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return top


def warm_up(d_model: int, device: torch.device) -> None:
    """Compiles all that `encode_topk` without `rows` launches for encoders of this width, which then no request waits for."""
    nothing = torch.zeros(_BLOCK_N, device=device)
    encoder = torch.zeros(_BLOCK_N, d_model, device=device)
    for n_rows in (_FEW_ROWS, _FEW_ROWS + 1):
        for k in (_SMALL_K, MAX_K):
            encode_topk(encoder[:n_rows], encoder, nothing, nothing, k)


def encode_topk_torch(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor,
    k: int,
    above: float = 0.0,
    *,
    rows: Tensor | None = None,
) -> TopFeatures:
    """What `encode_topk` returns, on a device that Triton does not compile for."""
    n_features = encoder.shape[0]
    picked = x if rows is None else x[rows.clamp(min=0)]
    z = torch.addmm(bias, picked.float(), encoder.float().T)
    fires = z > threshold
    if rows is not None:
        fires &= (rows >= 0)[:, None]
    strength = torch.where(fires, z.abs(), 0.0)
    # Positive floats order as their bits do; the index below them settles ties, which torch.topk leaves open.
    index = n_features - 1 - torch.arange(n_features, device=x.device)
    key = torch.where(strength > above, strength, 0.0).view(torch.int32).to(torch.int64) << 32
    best, place = (key | index).topk(min(k, n_features), dim=1)
    missing = best < 1 << 32
    features = place.to(torch.int32).masked_fill(missing, -1)
    values = z.gather(1, place).masked_fill(missing, 0.0)
    short = (0, k - features.shape[1])
    return TopFeatures(
        torch.nn.functional.pad(features, short, value=-1),
        torch.nn.functional.pad(values, short),
        fires.sum(1, dtype=torch.int32),
    )


def _chunks(device: torch.device, blocks: int) -> int:
    """Enough for two programs on each multiprocessor."""
    if device.type != "cuda":
        return 1
    return triton.cdiv(2 * torch.cuda.get_device_properties(device).multi_processor_count, blocks)


# Not specialized: what changes from call to call must not make Triton compile again.
@triton.jit(do_not_specialize=["n_rows", "n_features"], do_not_specialize_on_alignment=["rows"])
def _encode_chunk(
    x,
    rows,
    encoder,
    bias,
    threshold,
    out_keys,
    out_counts,
    n_rows,
    n_features,
    x_stride,
    chunk,
    above,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Row blocks of one chunk run side by side and find the encoder's tiles in the L2 cache.
    number = tl.program_id(1)
    given = place < n_rows
    row = place
    if HAS_ROWS:
        row = tl.load(rows + place, mask=given, other=-1)
    live = given & (row >= 0)
    x_row = x + row.to(tl.int64) * x_stride
    best = tl.zeros([BLOCK_M, K], tl.int64)
    active = tl.zeros([BLOCK_M], tl.int32)
    first = number * chunk
    for start in range(first, tl.minimum(first + chunk, n_features), BLOCK_N):
        feature = start + tl.arange(0, BLOCK_N)
        known = feature < n_features
        w_row = encoder + feature.to(tl.int64) * D
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, D, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = (column < D)[None, :]
            a = tl.load(x_row[:, None] + column[None, :], mask=live[:, None] & inside, other=0.0)
            b = tl.load(w_row[:, None] + column[None, :], mask=known[:, None] & inside, other=0.0)
            z = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), z, input_precision=PRECISION)
        z += tl.load(bias + feature, mask=known, other=0.0)[None, :]
        limit = tl.load(threshold + feature, mask=known, other=float("inf"))
        fires = (z > limit[None, :]) & live[:, None]
        active += tl.sum(fires.to(tl.int32), axis=1)
        key = tl.where(fires & (tl.abs(z) > above), _packed(z, feature[None, :]), 0)
        # Most tiles late in a chunk hold nothing that is stronger than what the rows have.
        better = key > tl.min(best, axis=1)[:, None]
        if tl.max(tl.max(better.to(tl.int32), axis=1), axis=0) > 0:
            best = keep_best(best, key, K)
    slot = place.to(tl.int64) * tl.num_programs(1) + number
    tl.store(
        out_keys + slot[:, None] * K + tl.arange(0, K)[None, :],
        best,
        mask=given[:, None],
    )
    tl.store(out_counts + slot, active, mask=given)


@triton.jit(do_not_specialize=["chunks", "k"])
def _merge_chunks(
    keys,
    counts,
    out_features,
    out_values,
    out_active,
    chunks,
    k,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best = tl.zeros([1, K], tl.int64)
    active = tl.zeros([GROUP], tl.int32)
    for start in range(0, chunks * K, GROUP):
        at = start + tl.arange(0, GROUP)
        key = tl.load(keys + row * chunks * K + at, mask=at < chunks * K, other=0)
        best = keep_best(best, tl.reshape(key, [1, GROUP]), K)
    for start in range(0, chunks, GROUP):
        at = start + tl.arange(0, GROUP)
        active += tl.load(counts + row * chunks + at, mask=at < chunks, other=0)
    key = tl.reshape(best, [K])
    found = key != 0
    low = (key & 0xFFFFFFFF) >> 1
    strength = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    value = tl.where((key & 1) != 0, -strength, strength)
    place = K - 1 - tl.arange(0, K)
    out = row * k + place
    tl.store(out_features + out, tl.where(found, low.to(tl.int32) ^ 0x7FFFFFFF, -1), mask=place < k)
    tl.store(out_values + out, tl.where(found, value, 0.0), mask=place < k)
    tl.store(out_active + row, tl.sum(active, axis=0))


@triton.jit
def _packed(f, feature):
    """The key of activation `f` != 0."""
    strength = tl.abs(f).to(tl.int32, bitcast=True).to(tl.int64) << 32
    index = (feature ^ 0x7FFFFFFF).to(tl.int64) << 1
    return strength | index | (f < 0).to(tl.int64)
