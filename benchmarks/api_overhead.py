"""What our gRPC costs a client beside vLLM's own OpenAI server: time to the first token, and between tokens.

Two servers with the same model and engine settings run side by side, each as an operator starts it: `steer-server` and
vLLM's `api_server` (what `vllm serve` runs). A client process puts 1, 8 and 32 streams on one of them while the other idles, in turns; a round is a
burst on each, in changing order, and a ratio is the median over rounds of (ours / vLLM's) of the same round. `readout`
is the same with the 32 strongest features of every generated token streamed along, which vLLM cannot give: its ratio is to
vLLM's plain streams. `null` is vLLM's server against itself, burst against burst: what the machine's noise amounts to.

`cpu` is the time that the server's process (not its engine's) ran for a token, over all rounds: noise and the luck of an
engine hardly move it, and with as many cores as the model has threads the model waits for it.

    python benchmarks/api_overhead.py --json build/api_overhead.json

`--quick` takes two short rounds of one stream, to see that it runs.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from common import add_engine_options, circumstances, measure, parser
from tqdm import tqdm

from steer_client import SteerClient, read_top
from steer_server.dictionary import files

PROMPT_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS = 64, 1024, 32
OURS, READOUT, THEIRS, NULL = "steer", "readout", "vllm", "null"
ARMS = (OURS, READOUT, THEIRS, NULL)
START_SECONDS = 300


class Latency(NamedTuple):
    """Seconds, each the median over the streams of a burst."""

    first: float
    between: float


class Burst(NamedTuple):
    latency: Latency
    cpu: float
    """Seconds that the server's process ran, for each token."""


class Servers:
    """Both, and a client of either."""

    def __init__(
        self,
        grpc: SteerClient,
        http: httpx.AsyncClient,
        processes: Sequence[psutil.Process],
        name: str,
        dictionary: str,
    ):
        """`processes` are steer's and vLLM's."""
        self._grpc = grpc
        self._http = http
        self._processes = processes
        self._name = name
        self._dictionary = dictionary
        self._count = 0

    async def burst(self, arm: str, streams: int, tokens: int) -> Burst:
        """Streams side by side, whose prompts nobody has sent before."""
        theirs = arm in (THEIRS, NULL)
        stream = self._openai if theirs else self._steer
        process = self._processes[theirs]
        before = _ran(process)
        results = await asyncio.gather(
            *(self._timed(stream, self._prompt(), tokens, arm) for _ in range(streams))
        )
        latency = Latency(
            statistics.median(found.first for found in results),
            statistics.median(found.between for found in results),
        )
        return Burst(latency, (_ran(process) - before) / (streams * tokens))

    async def _timed(
        self,
        stream: Callable[[list[int], int, str], AsyncIterator[int]],
        prompt: list[int],
        tokens: int,
        arm: str,
    ) -> Latency:
        began = time.perf_counter()
        times, count = [], 0
        async for new in stream(prompt, tokens, arm):
            count += new
            times.append(time.perf_counter())
        if count != tokens:
            raise RuntimeError(f"{arm} gave {count} tokens, not {tokens}")
        return Latency(times[0] - began, (times[-1] - times[0]) / max(1, tokens - 1))

    async def _steer(self, prompt: list[int], tokens: int, arm: str) -> AsyncIterator[int]:
        read_outs = []
        if arm == READOUT:
            read_outs = [read_top(self._dictionary, 32, only=["generated"])]
        options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        async for event in self._grpc.generate(prompt, read_outs=read_outs, **options):
            ids = getattr(event, "ids", ())
            if ids:
                yield len(ids)

    async def _openai(self, prompt: list[int], tokens: int, arm: str) -> AsyncIterator[int]:
        body = {
            "model": self._name,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        ids = choice.get("token_ids") or ()
                        if ids:
                            yield len(ids)

    def _prompt(self) -> list[int]:
        self._count += 1
        return [1000 + (self._count * 7919 + i * 31) % 40000 for i in range(PROMPT_TOKENS)]


async def measured(servers: Servers, options: argparse.Namespace) -> list[dict[str, Any]]:
    rounds, tokens, loads = (2, 8, [1]) if options.quick else (options.rounds, 48, [1, 8, 32])
    found = []
    for streams in loads:
        bursts: dict[str, list[Burst]] = {arm: [] for arm in ARMS}
        for arm in ARMS:
            await servers.burst(arm, streams, 4)
        for number in tqdm(range(rounds), desc=f"{streams} streams", unit="round"):
            order = ARMS[number % len(ARMS) :] + ARMS[: number % len(ARMS)]
            for arm in order:
                bursts[arm].append(await servers.burst(arm, streams, tokens))
        found.append({"streams": streams, **_summary(bursts)})
    return found


def _summary(bursts: dict[str, list[Burst]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in Latency._fields:
        theirs = [getattr(burst.latency, name) for burst in bursts[THEIRS]]
        entry: dict[str, Any] = {"vllm_ms": round(1e3 * statistics.median(theirs), 2)}
        for arm in (OURS, READOUT, NULL):
            mine = [getattr(burst.latency, name) for burst in bursts[arm]]
            ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
            entry[arm] = {
                "ratio": round(statistics.median(ratios), 3),
                "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
        summary[name] = entry
    # The kernel counts in ticks of 10 ms, too coarse for the median of short bursts.
    cpu = {arm: statistics.fmean(burst.cpu for burst in found) for arm, found in bursts.items()}
    summary["cpu"] = {arm: round(1e6 * seconds, 1) for arm, seconds in cpu.items()}
    return summary


def _ran(process: psutil.Process) -> float:
    """CPU seconds so far, without its children's."""
    times = process.cpu_times()
    return times.user + times.system


async def main(options: argparse.Namespace) -> dict[str, Any]:
    stored = files.load(options.dictionary)
    eager = [] if options.compiled else ["--enforce-eager"]
    bind = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Two engines on as many cores as one: the idle one must not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
        # The comparison is with vLLM alone.
        "STEER_DISABLE": "1",
    }
    ours, theirs, metrics = (_free_port() for _ in range(3))
    model = str(options.model)
    common = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
    common += ["--dtype", "float32", *eager]
    bin_folder = Path(sys.executable).parent
    steer = [str(bin_folder / "steer-server"), "--model", model, *common]
    steer += ["--dictionary", f"d={options.dictionary}", "--port", str(ours)]
    steer += ["--metrics-port", str(metrics), "--kv-cache-gib", "1"]
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *common]
    vllm += ["--port", str(theirs), "--served-model-name", "m", "--disable-uvicorn-access-log"]
    with tempfile.TemporaryFile() as log:
        processes = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            for command in (steer, vllm)
        ]
        try:
            async with (
                SteerClient(f"127.0.0.1:{ours}") as grpc,
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{theirs}", timeout=120) as http,
            ):
                await _until(lambda: grpc.dictionaries(), processes)
                await _until(lambda: _healthy(http), processes)
                running = [psutil.Process(process.pid) for process in processes]
                result = await measured(Servers(grpc, http, running, "m", "d"), options)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)
    return {
        **circumstances(options),
        "n_features": stored.card.n_features,
        "compiled": options.compiled,
        "prompt_tokens": PROMPT_TOKENS,
        "rounds": 2 if options.quick else options.rounds,
        "loads": result,
    }


async def _healthy(http: httpx.AsyncClient) -> None:
    (await http.get("/health")).raise_for_status()


async def _until(ready: Callable[[], Awaitable[Any]], processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            await ready()
            return
        except Exception:
            dead = [process.args for process in processes if process.poll() is not None]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"did not start: {dead or 'in time'}") from None
            await asyncio.sleep(1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    options = parser(__doc__, rounds=9)
    add_engine_options(options)
    measure(options.parse_args(), main)
