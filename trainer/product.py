"""Products of wide matrices in the precision that the configuration asks for; sums are always in float32."""

import torch
from torch import Tensor

from trainer.config import Precision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def product(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    """a b, [members, n, m], of factors that were rounded to `precision` before."""
    if precision == "float32":
        return a @ b
    a, b = rounded(a, precision), rounded(b, precision)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    # The same numbers but for the order of the sum; a CPU has no such product.
    return a.float() @ b.float()


def rounded(a: Tensor, precision: Precision) -> Tensor:
    """`a`, [members, n, m], as products take it."""
    if precision == "float32":
        return a
    dtype = _DTYPES[precision]
    # What is the same for all members is rounded once.
    return a[:1].to(dtype).expand_as(a) if a.stride(0) == 0 else a.to(dtype)
