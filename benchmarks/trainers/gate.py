"""Between the parent and a library's own training loop: what every driver has in common.

A driver hands its library's loop activations that come from a `Gate`. The loop asks for a batch when it is done with
the one before, so the time from the first of n batches until it asks for one more is that of n whole steps, whatever
the library does in them. Between runs the loop waits here, asleep.

The parent writes a line for each run, `{"steps": n}`, and reads a line of what it took. Drivers run in the environment
of their library, so this file knows torch and safetensors, and nothing else.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

SAMPLE = 256


class Gate(Iterator[Tensor]):
    """Batches in random order, let through as the parent asks."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(sys.argv[1])
        self._answers = os.fdopen(self.job["answers"], "w")
        torch.set_num_threads(self.job["threads"])
        rows = numpy.memmap(self.job["activations"], dtype=numpy.float32, mode="c")
        self.x = torch.from_numpy(rows.reshape(-1, self.job["d_model"]))
        self._generator = torch.Generator().manual_seed(self.job["seed"])
        self._order = torch.empty(0, dtype=torch.int64)
        self.facts: dict[str, Any] = {}
        """What the driver adds to every answer."""
        self._free = self._left = self._steps = 0
        self._began = self._cpu = 0.0

    def let_through(self, batches: int) -> None:
        """So many more batches that are no steps, such as those that a scale is estimated from."""
        self._free += batches

    def __next__(self) -> Tensor:
        self.wait()
        return self.x[self.index()]

    def index(self) -> Tensor:
        """The rows of the next batch; each epoch has a new order."""
        batch = self.job["batch"]
        if len(self._order) < batch:
            self._order = torch.randperm(len(self.x), generator=self._generator)
        found, self._order = self._order[:batch], self._order[batch:]
        return found

    def wait(self) -> None:
        """Returns once a batch may pass."""
        if self._free:
            self._free -= 1
            return
        if not self._left:
            self._answer()
            line = sys.stdin.readline()
            if not line:
                os._exit(
                    0
                )  # the parent has what it wanted: a loop's clean-up may write a checkpoint
            self._steps = self._left = json.loads(line)["steps"]
            self._began, self._cpu = time.perf_counter(), time.process_time()
        self._left -= 1

    def save(
        self,
        tensors: dict[str, Tensor],
        kind: dict[str, Any],
        reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        """Writes the dictionary that came of it, with what the library itself makes of some x: f and x_hat.

        `tensors` are named as in our `Dictionary`, and `kind` holds its other fields.
        """
        x = self.x[:: len(self.x) // SAMPLE][:SAMPLE].clone()
        with torch.no_grad():
            f, x_hat = reconstruct(x)
        parts = tensors | {"sample.x": x, "sample.f": f, "sample.x_hat": x_hat}
        parts = {name: part.detach().float().contiguous() for name, part in parts.items()}
        save_file(parts, self.job["out"], metadata={"kind": json.dumps(kind)})
        self._answer()

    def _answer(self) -> None:
        taken = {
            "steps": self._steps,
            "tokens": self.job["batch"],
            "seconds": time.perf_counter() - self._began,
            "cpu_seconds": time.process_time() - self._cpu,
        }
        print(json.dumps(taken | self.facts), file=self._answers, flush=True)
