"""Products of wide matrices in the precision that the configuration asks for; sums are always in float32."""

import torch
from torch import Tensor

from steer_server.dictionary.linear import WIDE, linear
from trainer.config import Precision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def product(a: Tensor, b: Tensor, precision: Precision, bias: Tensor | None = None) -> Tensor:
    """a b + bias, [members, n, m], of factors that are rounded to `precision` before; `bias` is [members, m]."""
    if precision != "float32":
        a, b = rounded(a, precision), rounded(b, precision)
        if a.is_cuda:
            z = torch.bmm(a, b, out_dtype=torch.float32)
            return z if bias is None else z.add_(bias[:, None])
        # The same numbers but for the order of the sum; a CPU has no such product.
        a, b = a.float(), b.float()
    # oneDNN has no product of many members, and for a transposed factor on the left MKL is as fast.
    if a.stride(2) == 1 and (len(a) == 1 or (a.device.type == "cpu" and b[0].numel() >= WIDE)):
        biases = [None] * len(a) if bias is None else bias
        parts = [linear(*factors) for factors in zip(a, b.mT, biases, strict=True)]
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)
    return a @ b if bias is None else torch.baddbmm(bias[:, None], a, b)


def rounded(a: Tensor, precision: Precision) -> Tensor:
    """`a`, [members, n, m], as products take it."""
    if precision == "float32":
        return a
    dtype = _DTYPES[precision]
    # What is the same for all members is rounded once.
    return a[:1].to(dtype).expand_as(a) if a.stride(0) == 0 else a.to(dtype)
