"""The server's process with the real engine: signals under load, and the death of its engine."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from steer.v1 import steering_pb2

from steer_client import CallFailed, SteerClient, add
from steer_server.dictionary.files import StoredDictionary
from tests.e2e.helpers import IOI, TEXTS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

_START_SECONDS = 300
_VLLM_TEXT = re.compile(r"(\(.*\) )?(DEBUG|INFO|WARNING|ERROR) \d\d-\d\d ")
_SERVING = re.compile(r"serving .* on (\S+), metrics on")


@asynccontextmanager
async def running_server(
    model: Path, dictionary: StoredDictionary, log: Path, *flags: str
) -> AsyncIterator[tuple[psutil.Popen, str]]:
    """The process and its address; it and its children end after."""
    command = [sys.executable, "-m", "steer_server", "--model", str(model), "--enforce-eager"]
    command += ["--dictionary", str(dictionary.folder), "--port", "0", "--metrics-port", "0"]
    command += ["--kv-cache-gib", "1", "--max-model-len", "512", "--dtype", "float32", *flags]
    with log.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not (match := _SERVING.search(log.read_text())):
                assert process.poll() is None, log.read_text()[-4000:]
                await asyncio.sleep(0.2)
        yield process, match[1]
    finally:
        if process.is_running():
            children = process.children(recursive=True)
            for left in (process, *children):
                left.kill()
            process.wait(30)


async def generate(
    client: SteerClient, prompt: str, begun: asyncio.Semaphore, tokens: int
) -> tuple[list[int], Any]:
    """The tokens and how the generation finished."""
    ids, finished = [], None
    edits = [add(("random", 9), 0.1, "norm")]
    async for event in client.generate(
        prompt, edits=edits, temperature=0, max_tokens=tokens, ignore_eos=True
    ):
        match event:
            case steering_pb2.Tokens():
                ids += event.ids
                begun.release()
            case steering_pb2.Finished():
                finished = event
    return ids, finished


async def turn(client: SteerClient, begun: asyncio.Semaphore, tokens: int) -> tuple[list[int], Any]:
    """The same as a session's turn; the client leaves the session open behind it."""
    ids = []
    async with client.session() as session:
        await session.start(IOI, temperature=0, max_tokens=tokens, ignore_eos=True)
        async for event in session:
            match event:
                case steering_pb2.Tokens():
                    ids += event.ids
                    begun.release()
                case steering_pb2.Finished():
                    return ids, event
    return ids, None


async def test_a_signal_under_load_loses_no_turn_that_fits_the_drain(
    model_path: Path,
    random_dictionary: StoredDictionary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what the server and vLLM's processes log is JSON, if asked for."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    flags = ("--drain-seconds", "120", "--max-num-seqs", "4", "--log-format", "json")
    log = tmp_path / "server.log"
    async with (
        running_server(model_path, random_dictionary, log, *flags) as (process, target),
        SteerClient(target) as client,
    ):
        begun = asyncio.Semaphore(0)
        # More than run together: some wait in vLLM's queue when the signal comes.
        work = [generate(client, text, begun, 12) for text in (*TEXTS, IOI)]
        work += [turn(client, begun, 12) for _ in range(2)]
        running = asyncio.gather(*work)
        for _ in range(8):
            await begun.acquire()
        os.kill(process.pid, signal.SIGTERM)
        await asyncio.sleep(0.3)

        with pytest.raises(CallFailed) as refused:
            await client.dictionaries()
        outcomes = await running
        code = await asyncio.to_thread(process.wait, 60)

    assert (refused.value.code, refused.value.reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "ENGINE_UNAVAILABLE",
    )
    assert [len(ids) for ids, _ in outcomes] == [12] * 7
    assert {event.reason for _, event in outcomes} == {steering_pb2.FINISH_REASON_LENGTH}
    assert code == 0
    lines = log.read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert {"steer", "vllm"} <= {line["logger"].partition(".")[0] for line in logged}
    assert not [line for line in lines if _VLLM_TEXT.match(line)]


async def test_the_death_of_the_engine_ends_calls_and_server_at_once(
    model_path: Path, random_dictionary: StoredDictionary, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    async with (
        running_server(model_path, random_dictionary, log) as (process, target),
        SteerClient(target) as client,
    ):
        children = process.children(recursive=True)
        begun, ended = asyncio.Semaphore(0), []

        async def until_it_fails(call) -> CallFailed:
            with pytest.raises(CallFailed) as caught:
                await call
            ended.append(time.monotonic())
            return caught.value

        work = [generate(client, text, begun, 400) for text in TEXTS[:2]]
        work.append(turn(client, begun, 400))
        running = asyncio.gather(*map(until_it_fails, work))
        for _ in range(6):
            await begun.acquire()
        (core,) = [
            child for child in children if any("EngineCore" in part for part in child.cmdline())
        ]
        killed = time.monotonic()
        os.kill(core.pid, signal.SIGKILL)
        failures = await running
        code = await asyncio.to_thread(process.wait, 30)
        exited = time.monotonic() - killed

    assert {failure.code for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
    assert {failure.reason for failure in failures} == {"ENGINE_UNAVAILABLE"}
    assert max(ended) - killed < 2
    assert code == 1, log.read_text()[-2000:]
    assert exited < 15
    assert psutil.wait_procs(children, 10)[1] == []
