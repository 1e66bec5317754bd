"""Between host and device, without holding up either."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Transfer:
    """Copies that have been asked for. What is on the host, tensor or array, is not copied."""

    def __init__(self, values: Sequence[Tensor | NDArray[Any]]) -> None:
        self._values = values
        self._copied: torch.cuda.Event | None = None
        if any(isinstance(value, Tensor) and value.is_cuda for value in values):
            self._values = [
                _pinned(value).copy_(value, non_blocking=True)
                if isinstance(value, Tensor)
                else value
                for value in values
            ]
            # Blocking, so that the thread that waits does not spin.
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> list[NDArray[Any]]:
        """The values on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return [value.numpy() if isinstance(value, Tensor) else value for value in self._values]


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """The values there, in the order of the device's work; the host goes on."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return (
        host.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else host.to(device)
    )


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
