"""Brings tensors to the host without holding up the device that computes them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Transfer:
    """Copies that have been asked for. On CPU there is nothing to copy."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copied: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [_pinned(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
            # Blocking, so that the thread that waits does not spin.
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
