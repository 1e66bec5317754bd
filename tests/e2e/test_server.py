"""The gRPC server on the real engine, and the server's process as an operator treats it."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from steer.v1 import steering_pb2

from steer_client import SteerClient, ablate, add, read, read_top, rows
from steer_server.dictionary.edits import Ablate, AddRelative
from steer_server.dictionary.files import StoredDictionary
from tests.e2e.helpers import IOI
from tests.e2e.reference import Reference
from tests.e2e.test_engine import from_one

pytestmark = pytest.mark.e2e


async def test_edits_and_read_out_over_grpc_equal_the_reference(
    client: SteerClient, reference: Reference, random_dictionary: StoredDictionary
) -> None:
    ids, logprobs, positions = [], [], {}
    edits = [add(("random", 9), 0.5, "norm"), ablate(("random", 7))]
    finished = None
    async for event in client.generate(
        IOI,
        edits=edits,
        read_outs=[read("random", [9])],
        temperature=0,
        max_tokens=16,
        ignore_eos=True,
        logprobs=True,
    ):
        match event:
            case steering_pb2.Tokens():
                ids += event.ids
                logprobs += event.logprobs
                for activations in event.activations:
                    positions |= {row.position: row.features for row in rows(activations)}
            case steering_pb2.Finished():
                finished = event

    prompt = reference.tokenize(IOI)
    expected = reference.generate(prompt, 16, from_one((AddRelative(9, 0.5), Ablate(7))))
    assert tuple(ids) == expected.token_ids
    assert logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    f = random_dictionary.dictionary.encode(expected.x)[:, 9].tolist()
    assert sorted(positions) == list(range(len(f)))
    for position, value in enumerate(f):
        got = dict(positions[position]).get(9, 0.0)
        assert got == pytest.approx(value, abs=1e-3)
    assert finished is not None
    assert [r.tokens_in_scope for r in finished.edit_reports] == [len(prompt) + 14] * 2
    assert finished.edit_reports[0].mean_relative_size == pytest.approx(0.5)


async def test_a_session_acknowledges_an_update_by_the_token_it_holds_from(
    client: SteerClient, reference: Reference
) -> None:
    prompt, ids, applied = reference.tokenize(IOI), [], None
    async with client.session() as session:
        await session.start(IOI, temperature=0, max_tokens=32, ignore_eos=True)
        async for event in session:
            match event:
                case steering_pb2.Tokens():
                    before = len(ids)
                    ids += event.ids
                    if before < 6 <= len(ids):
                        await session.update([add(("random", 9), 0.5, "norm")])
                case steering_pb2.UpdateApplied():
                    applied = event
                    assert len(ids) <= event.first_index
                case steering_pb2.Finished():
                    break

    assert applied is not None
    assert applied.revision == 1
    boundary = len(prompt) + applied.first_index - 1
    edits = (AddRelative(9, 0.5),)
    expected = reference.generate(prompt, 32, lambda p: edits if p >= boundary else ())
    assert tuple(ids) == expected.token_ids


async def test_encode_lists_each_token_with_its_strongest_features(
    client: SteerClient, reference: Reference, random_dictionary: StoredDictionary
) -> None:
    pieces, found = [], {}
    async for response in client.encode(IOI, [read_top("random", 3)]):
        pieces += response.tokens.pieces
        for activations in response.activations:
            found |= {row.position: row for row in rows(activations)}

    x = reference.generate(reference.tokenize(IOI), 1, from_one(())).x
    f = random_dictionary.dictionary.encode(x)
    assert "".join(pieces) == IOI
    for position, row in found.items():
        values, features = f[position].topk(3)
        want = [(int(i), float(v)) for i, v in zip(features, values, strict=True) if v > 0]
        assert [feature for feature, _ in row.features] == [feature for feature, _ in want]
        assert row.active == int((f[position] > 0).sum())
    assert sorted(found) == list(range(len(pieces)))


def test_a_signal_while_the_server_starts_leaves_no_process_behind(
    model_path: Path, random_dictionary: StoredDictionary
) -> None:
    command = [sys.executable, "-m", "steer_server", "--model", str(model_path)]
    command += ["--dictionary", str(random_dictionary.folder), "--enforce-eager"]
    command += ["--port", "0", "--metrics-port", "0", "--kv-cache-gib", "1"]
    server = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not any("VLLM" in part for c in server.children() for part in c.cmdline()):
        assert server.poll() is None
        assert time.monotonic() < end, "vLLM starts no process of its own"
        time.sleep(0.2)
    children = server.children(recursive=True)

    server.terminate()

    assert server.wait(60) == 143
    _, alive = psutil.wait_procs(children, 20)
    assert alive == []
