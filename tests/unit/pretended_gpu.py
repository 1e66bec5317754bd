"""A GPU that is not there: tensors on the host that pass for tensors on a device.

While `PretendedGpu` is active calls of torch go through it. It fails where a device would: on operands from
both sides, and on memory of the device that numpy reads. It counts where the host would wait for the device, and a
copy to the host has arrived only once an event recorded after it was waited for. Triton's interpreter stands in for
its compiler. What a device does on its own time, and how fast, it cannot tell; nor a wait inside of torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
_NEVER = {"numpy", "__array__"}
_WAITS = {"cpu", "tolist", "item", "nonzero", "argwhere", "masked_select", "equal", "allclose"}
_WAITS |= {
    "unique",
    "bincount",
    "repeat_interleave",
    "tensor",
    "as_tensor",
    "asarray",
    "new_tensor",
}
_WAITS |= {"__bool__", "__int__", "__float__", "__index__"}


class OnDevice(Tensor):
    """On the GPU."""


class Pinned(Tensor):
    """On the host, where the GPU may copy to and from while the host goes on."""


class PretendedGpu(TorchFunctionMode):
    """`waits` names the calls for which the host had to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._arriving: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
        here = [part for part in tensors if isinstance(part, OnDevice)]
        name = getattr(func, "__name__", str(func))
        with torch._C.DisableTorchFunction():
            if name == "__get__":
                return self._attribute(func, args[0])
            if name == "to":
                return self._to(*args, **kwargs)
            if name == "copy_":
                return self._copy(*args, **kwargs)
            if name == "pin_memory":
                return args[0].clone().as_subclass(Pinned)
            if kwargs.pop("pin_memory", False):
                return func(*args, **kwargs).as_subclass(Pinned)
            wanted = kwargs.get("device")
            if wanted is not None and torch.device(wanted).type == "cuda":
                kwargs["device"] = "cpu"
            elif not here:
                return func(*args, **kwargs)
            elif name in _NEVER:
                raise TypeError(f"{name} of a tensor on {DEVICE}")
            self._check(name, tensors, args)
            if name in _WAITS:
                self.waits.append(name)
            found = func(
                *tree_map_only(Tensor, plain, args), **tree_map_only(Tensor, plain, kwargs)
            )
            return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(OnDevice), found)

    def arriving(self) -> list[tuple[Tensor, Tensor]]:
        """The copies to the host that have been asked for since the last call."""
        arriving, self._arriving = self._arriving, []
        return arriving

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        if isinstance(tensor, OnDevice):
            told = {Tensor.is_cuda: True, Tensor.is_cpu: False, Tensor.device: DEVICE}
            for attribute, value in told.items():
                if func == attribute.__get__:
                    return value
        found = func(tensor)
        return found.as_subclass(type(tensor)) if isinstance(found, Tensor) else found

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        devices = [part for part in args if isinstance(part, (torch.device, str))]
        target = torch.device(devices[0]) if devices else None
        rest = [part for part in args if part not in devices]
        if target is None or (target.type == "cuda") == isinstance(tensor, OnDevice):
            found = plain(tensor).to(*rest, **kwargs)
            return found.as_subclass(type(tensor))
        if not (isinstance(tensor, Pinned) and kwargs.get("non_blocking")):
            self.waits.append("to")
        found = plain(tensor).clone().to(*rest, **kwargs)
        return found.as_subclass(OnDevice) if target.type == "cuda" else found

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        there, back = isinstance(target, OnDevice), isinstance(source, OnDevice)
        if there == back:
            plain(target).copy_(plain(source))
            return target
        if not (non_blocking and isinstance(source if there else target, Pinned)):
            self.waits.append("copy_")
            plain(target).copy_(plain(source))
        elif there:
            plain(target).copy_(plain(source))
        else:
            self._arriving.append((plain(target), plain(source).clone()))
            plain(target).view(torch.uint8).fill_(0xFF)
        return target

    def _check(self, name: str, tensors: list[Tensor], args: Any) -> None:
        away = [part for part in tensors if not isinstance(part, OnDevice) and part.ndim]
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnDevice):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [part for part in index if getattr(part, "dtype", None) == torch.bool]
            arrays = [part for part in index if isinstance(part, (np.ndarray, list))]
            if masks or arrays or away:
                self.waits.append(name)
        elif away:
            raise RuntimeError(f"{name} of tensors on {DEVICE} and on the host")


class Event:
    """`torch.cuda.Event`, as far as `transfer.py` uses it."""

    gpu: PretendedGpu

    def __init__(self, blocking: bool = False) -> None:
        self._arriving: list[tuple[Tensor, Tensor]] = []

    def record(self) -> None:
        self._arriving = self.gpu.arriving()

    def synchronize(self) -> None:
        with torch._C.DisableTorchFunction():
            for target, source in self._arriving:
                target.copy_(source)


class Kernel:
    """One of Triton's, interpreted, that takes tensors on the device only."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            for number, part in enumerate(args):
                if isinstance(part, Tensor) and not isinstance(part, OnDevice):
                    raise TypeError(f"argument {number} of the kernel is on the host")
            self.launches += 1
            with torch._C.DisableTorchFunction():
                self._kernel[grid](*tree_map_only(Tensor, plain, args), **kwargs)

        return launch


def plain(tensor: Tensor) -> Tensor:
    """The same memory, without pretence."""
    return tensor.as_subclass(Tensor)


def place(tensor: Tensor) -> Tensor:
    """The same memory, as if it were the device's."""
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(OnDevice)


@contextmanager
def at_work(gpu: PretendedGpu) -> Iterator[None]:
    """Makes torch, and the kernels of the server, take `DEVICE` for real."""
    from steer_server.vllm_plugin import edit_kernel, encode_kernel

    with pytest.MonkeyPatch.context() as patch, gpu:
        patch.setattr(Event, "gpu", gpu, raising=False)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        properties = SimpleNamespace(multi_processor_count=132)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for module, name in (
            (edit_kernel, "_edit_row"),
            (encode_kernel, "_encode_chunk"),
            (encode_kernel, "_merge_chunks"),
        ):
            patch.setattr(module, name, Kernel(getattr(module, name)))
        yield
