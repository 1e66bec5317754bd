"""A step as one CUDA graph: recorded after some ordinary calls, and from then on replayed without Python."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.step import Outcome

_WARM_UP = 3
"""Ordinary calls before: Triton compiles, cuBLAS allocates, the optimiser makes its state."""


class Replayed:
    """`work` with the same effect on everything, bit for bit.

    All that `work` reads and writes beside the batch must keep its address, and nothing in it may wait for the device.
    What it returns holds until the next call.
    """

    def __init__(self, work: Callable[[Tensor, bool], Outcome]) -> None:
        """`work` takes a batch and a choice, each value of which has a graph, for batches of the first one's shape."""
        self._work = work
        self._calls = {False: 0, True: 0}
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Outcome]] = {}
        self._x: Tensor | None = None
        self._stream = torch.cuda.Stream()

    def __call__(self, x: Tensor, choice: bool) -> Outcome:
        if self._x is None:
            self._x = torch.empty_like(x)
        if x.shape != self._x.shape:
            # A buffer's batch is shorter by the activations that a site leaves out.
            return self._work(x, choice)
        self._x.copy_(x)
        self._calls[choice] += 1
        if self._calls[choice] <= _WARM_UP:
            # On the stream of the capture, as torch asks for.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                found = self._work(self._x, choice)
            torch.cuda.current_stream().wait_stream(self._stream)
            return found
        if choice not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                found = self._work(self._x, choice)
            self._graphs[choice] = graph, found
        graph, found = self._graphs[choice]
        graph.replay()
        return found
