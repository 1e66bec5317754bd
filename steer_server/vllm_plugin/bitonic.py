"""The K largest of rows of int64 keys, by bitonic networks inside a Triton kernel.

`tl.sort` and `tl.topk` do the same, but sort again what only needs a merge, and exchange by an xor reduction, which
Triton's interpreter runs number by number. Rows and widths are powers of two.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# (Triton's language is not Python to a type checker.)

import triton
import triton.language as tl


@triton.jit
def keep_best(best, key, K: tl.constexpr):
    """The K largest of each row of both, ascending, as `best` is."""
    # The larger of an ascending and a descending list of K, place by place, are the K largest, in bitonic order.
    both = tl.maximum(best, _top(key, K))
    h = tl.reshape(both, [2] * _log2(both.numel))
    return tl.reshape(_merged(h, _log2(K), 0), best.shape)


@triton.jit
def _top(x, K: tl.constexpr):
    """The K largest of each row of `x` [rows, n], descending; K <= n."""
    log_n: tl.constexpr = _log2(x.shape[1])
    log_k: tl.constexpr = _log2(K)
    h = tl.reshape(x, [2] * _log2(x.numel))
    for stage in tl.static_range(1, log_k + 1):
        h = _merged(h, stage, 2 if stage < log_n else 1)
    for stage in tl.static_range(log_k + 1, log_n + 1):
        h = tl.max(h, axis=_log2(h.numel) - 1 - log_k)
        h = _merged(h, log_k, 2 if stage < log_n else 1)
    return tl.reshape(h, [x.shape[0], K])


@triton.jit
def _merged(h, stage: tl.constexpr, order: tl.constexpr):
    """Sorts bitonic runs of 2**stage in a hypercube: ascending (0), descending (1), by turns (2)."""
    n_dims: tl.constexpr = _log2(h.numel)
    flip = order
    if order == 2:
        flip = tl.reshape(tl.arange(0, 2), [1] * (n_dims - stage - 1) + [2] + [1] * stage)
    for i in tl.static_range(stage):
        # The pairs along dimension n_dims - stage + i; `right` is their second place.
        right = tl.reshape(
            tl.arange(0, 2), [1] * (n_dims - stage + i) + [2] + [1] * (stage - 1 - i)
        )
        other = tl.sum(h, axis=n_dims - stage + i, keep_dims=True) - h
        h = tl.where((h > other) != ((flip ^ right) != 0), other, h)
    return h


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1
