"""What the benchmarks of the engine take and say in common."""

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every one has; `rounds` is the default number."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    made.add_argument("--json", type=Path, help="write the result here as well")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--quick", action="store_true")
    return made


def add_engine_options(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--dictionary",
        type=Path,
        default=Path("examples/dictionaries/smollm2-135m-resid10"),
        help="folder (default: %(default)s)",
    )
    made.add_argument("--compiled", action="store_true")


def circumstances(
    options: argparse.Namespace, versions: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """When, on what and with what a result was measured; `versions` are the engine's unless given."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{_cpu()}, {os.cpu_count()} cores",
        "versions": _engine_versions() if versions is None else versions,
        "model": options.model.name,
    }


def measure(
    options: argparse.Namespace, main: Callable[[argparse.Namespace], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Runs `main`, prints its result and writes it where the options say."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    result = asyncio.run(main(options))  # type: ignore[arg-type]
    publish(options, result)
    return result


def publish(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Prints the result and writes it where the options say."""
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


def _engine_versions() -> dict[str, str]:
    # Only benchmarks of the engine wait for it to be imported.
    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__}


def _cpu() -> str:
    """Its name and the widest vectors it has, by which processors of one name differ most."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor()
    flags = facts.get("flags", "").split()
    return next((f"{name} with {flag}" for flag in ("avx512f", "avx2") if flag in flags), name)
