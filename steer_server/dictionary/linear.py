"""The product that encoding is made of, and most of training, by the fastest way there is."""

import platform

import torch
from jaxtyping import Float
from torch import Tensor

WIDE = 2**18
"""Weights from which on oneDNN is faster; below, its call costs more than it saves."""
_FEW = 16
"""Rows that a packed weight is laid out for, as of a decoding batch; it serves any number."""
_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def pack(weight: Float[Tensor, "features d"]) -> Tensor | None:
    """A copy of `weight` in the order in which oneDNN reads it, for `linear`; None where that would not take it.

    Without it oneDNN makes one for each product, which counts where rows are few. It takes as much memory as the weight.
    """
    if not _suits(weight):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _FEW)


def linear(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "features d"],
    bias: Float[Tensor, " features"] | None = None,
    relu: bool = False,
    packed: Tensor | None = None,
) -> Float[Tensor, "*rows features"]:
    """x W^T + b, or ReLU of it, which may take what is no number for 0; `packed` is of the same `weight`.

    On a CPU torch multiplies float32 by MKL, which on an AMD is slower than the oneDNN in torch, at few rows by half
    (`benchmarks/trainer_throughput.py` has both at many). torch.compile calls oneDNN by this op.
    """
    wanted = (t for t in (x, weight, bias) if t is not None)
    if (
        _suits(weight)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in wanted))
    ):
        how = "relu" if relu else "none"
        # It takes the bias for contiguous without asking.
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(
            x, weight if packed is None else packed, bias, how, [], ""
        )
    z = torch.nn.functional.linear(x, weight, bias)
    return z.relu_() if relu else z


def _suits(weight: Tensor) -> bool:
    return (
        _ONEDNN
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= WIDE
    )
