"""Between the parent and a library's whole training, from token ids to weights: told when to begin, it says how long it took.

As `gate.py` it runs in the library's environment, and knows torch and safetensors only.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class Whole:
    """A driver loads what it needs, and then calls `run`."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(sys.argv[1])
        self._answers = os.fdopen(self.job["answers"], "w")
        torch.set_num_threads(self.job["threads"])
        torch.manual_seed(self.job["seed"])
        self.contexts: Tensor = load_file(self.job["tokens"])["train"]
        """Contexts x positions."""

    def run(self, train: Callable[[], int]) -> None:
        """Times `train`, which returns the number of tokens that the dictionary was trained on."""
        self._answer({})
        sys.stdin.readline()
        began, cpu = time.perf_counter(), time.process_time()
        tokens = train()
        taken = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        self._answer(taken | {"tokens": tokens})

    def _answer(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self._answers, flush=True)
