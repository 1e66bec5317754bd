"""The product that encoding is made of, by the fastest way there is."""

import torch
from jaxtyping import Float
from torch import Tensor

WIDE = 2**18
"""Weights from which on oneDNN is faster; below, its call costs more than it saves."""
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "features d"],
    bias: Float[Tensor, " features"] | None = None,
    relu: bool = False,
) -> Float[Tensor, "*rows features"]:
    """x W^T + b, or ReLU of it.

    On a CPU torch multiplies float32 by MKL, which leaves half of an AMD's arithmetic unused, and streams a wide matrix at
    a third of the speed of memory for a few rows. The oneDNN in torch does neither; torch.compile calls it by this op.
    """
    if (
        _ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= WIDE
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        how = "relu" if relu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, how, [], "")
    z = torch.nn.functional.linear(x, weight, bias)
    return z.relu_() if relu else z
