"""What the Triton kernels take of a GPU, by its assembler: registers, what spills out of them, shared memory.

Needs no GPU: Triton compiles for one that is not there. How fast they are says kernels.py, which does need one.

    python benchmarks/kernel_resources.py --arch 90 --json build/kernel_resources.json

`--quick` takes one width.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from steer_server.admission import MAX_EDITS
from steer_server.vllm_plugin.edit_kernel import MAX_D_MODEL, Bank, Lines, Outcome, edit_rows
from steer_server.vllm_plugin.encode_kernel import MAX_K, encode_topk

WIDTHS = (576, 1024, 2048, 3072, 4096, 5120, 8192, MAX_D_MODEL)


def only_compile(arch: int) -> list[Any]:
    """From now on a launch runs nothing and compiles for a GPU of `arch`, which need not be there: all that is compiled."""
    compiled: list[Any] = []

    class OnlyTarget:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_only(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled.append(kernel.warmup(*arguments, grid=grid, **options))

        return launch

    triton.runtime.driver.set_active(OnlyTarget())  # pyright: ignore[reportArgumentType]
    JITFunction.__getitem__ = compile_only  # pyright: ignore[reportAttributeAccessIssue]
    return compiled


def main(options: argparse.Namespace) -> dict[str, Any]:
    compiled = only_compile(options.arch)
    found = []
    cases = list(_cases(WIDTHS[:1] if options.quick else WIDTHS))
    for name, width, launch in tqdm(cases, desc=f"compiling for sm_{options.arch}"):
        compiled.clear()
        launch()
        found += [
            {"case": name, "d_model": width, "kernel": each.metadata.name} | _resources(each)
            for each in compiled
        ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "arch": options.arch,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "kernels": found,
    }


def _cases(widths: tuple[int, ...]) -> Iterator[tuple[str, int, Any]]:
    for width in widths:
        yield "edits, bfloat16", width, lambda width=width: _edit(width)
    # Which does not depend on the width but for a loop's length.
    for rows in (16, 64):
        for k in (32, MAX_K):
            yield f"top {k}, {rows} rows a program", 4096, lambda rows=rows, k=k: _top(rows, k)


def _edit(width: int) -> None:
    x, row, numbers = torch.zeros(16, width), torch.zeros(16), torch.zeros(16, dtype=torch.int32)
    entries, slots = torch.zeros(16, MAX_EDITS), torch.zeros(16, MAX_EDITS, dtype=torch.int32)
    hidden = x.to(torch.bfloat16)
    edit_rows(
        hidden,
        hidden.clone(),
        Bank(x, row, row, x, row),
        Lines(numbers, slots, *[entries] * 5, slots, entries, row, row),
        numbers,
        numbers,
        Outcome(entries, row, row, numbers, x, x),
    )


def _top(rows: int, k: int) -> None:
    encoder, numbers = torch.zeros(1024, 4096), torch.zeros(1024)
    encode_topk(encoder[:rows], encoder, numbers, numbers, k)


def _resources(kernel: Any) -> dict[str, int]:
    """Of each thread; shared memory of all of a program's."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]  # pyright: ignore
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if used is None:
        raise ValueError(f"cuobjdump names no registers:\n{said}")
    return {
        "threads": 32 * kernel.metadata.num_warps,
        "registers": int(used[1]),
        "spilled_bytes": int(used[2]),
        "shared_bytes": kernel.metadata.shared,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90, help="compute capability, as 80 or 90")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    text = json.dumps(main(options), indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")
