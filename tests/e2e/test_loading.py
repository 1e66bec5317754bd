"""Dictionaries that come and go on the real engine while it generates."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from steer.v1 import admin_pb2, admin_pb2_grpc, steering_pb2

from steer_client import CallFailed, SteerClient, add, read_top
from steer_server.api.admin import Operations
from steer_server.api.generations import Generations
from steer_server.api.server import Server
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.edits import AddRelative
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from steer_server.engine import VllmEngine
from steer_server.metrics import Metrics
from steer_server.registry import Registry
from tests.conftest import SITE
from tests.dictionaries import make_dictionary
from tests.e2e.helpers import IOI
from tests.e2e.reference import Reference
from tests.e2e.test_engine import from_one

pytestmark = pytest.mark.e2e

EDIT = AddRelative(9, 0.5)


@pytest.fixture(scope="module")
def root(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for name, seed in (("first", 101), ("later", 102)):
        make_dictionary(model_path, SITE, root / name, bias=-14.0, seed=seed)
    make_dictionary(model_path, Site.parse("resid_post.3"), root / "elsewhere")
    return root


@pytest.fixture(scope="module")
async def target(
    engine: VllmEngine, random_dictionary: StoredDictionary, root: Path
) -> AsyncIterator[str]:
    registry = Registry()
    registry.add("random", random_dictionary)
    metrics = Metrics(engine.model_id, registry, {})
    server = Server(metrics)
    port = server.bind("127.0.0.1", 0)
    await server.start(Generations(engine, registry, metrics, {}), Operations(root))
    await server.open()
    yield f"127.0.0.1:{port}"
    await server.stop()


async def steered(client: SteerClient) -> tuple[int, ...]:
    ids: list[int] = []
    edits = [add(("guest", EDIT.feature), EDIT.share, "norm")]
    async for event in client.generate(
        IOI, edits=edits, temperature=0, max_tokens=16, ignore_eos=True
    ):
        if isinstance(event, steering_pb2.Tokens):
            ids += event.ids
    return tuple(ids)


def expected(reference: Reference, dictionary: Dictionary) -> tuple[int, ...]:
    with reference.also(SITE.layer, dictionary, from_one((EDIT,))):
        return reference.generate(reference.tokenize(IOI), 16, from_one(())).token_ids


async def test_a_dictionary_comes_and_goes_while_another_generation_runs(
    engine: VllmEngine, reference: Reference, target: str, root: Path
) -> None:
    from steer_server.dictionary.files import load

    wanted = [expected(reference, load(root / name).dictionary) for name in ("first", "later")]
    async with grpc.aio.insecure_channel(target) as channel, SteerClient(target) as client:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        unload = admin_pb2.UnloadDictionaryRequest(name="guest")
        running = client.generate(
            IOI,
            read_outs=[read_top("random", 1)],
            temperature=0,
            max_tokens=900,
            ignore_eos=True,
        )
        await anext(running)
        await anext(running)
        got = []
        for folder in ("first", "later"):
            coming = admin_pb2.LoadDictionaryRequest(folder=folder, name="guest")
            await admin.LoadDictionary(coming)
            got.append(await steered(client))
            user = client.generate(IOI, read_outs=[read_top("guest", 1)], max_tokens=900)
            await anext(user)
            await anext(user)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await admin.UnloadDictionary(unload)
            assert CallFailed.from_rpc(refused.value).reason == "DICTIONARY_IN_USE"
            gone = asyncio.ensure_future(_answer(admin, folder))
            await user.aclose()
            await gone
        with pytest.raises(CallFailed) as missing:
            await steered(client)
        more = [await anext(running) for _ in range(3)]
        await running.aclose()

    assert got == wanted
    assert wanted[0] != wanted[1], "the test could not tell them apart"
    assert missing.value.reason == "DICTIONARY_NOT_FOUND"
    assert all(event.activations[0].dictionary == "random" for event in more)
    assert "guest" not in engine._frontend.admission.dictionaries


async def _answer(admin: admin_pb2_grpc.AdminServiceStub, _: str) -> None:
    await admin.UnloadDictionary(admin_pb2.UnloadDictionaryRequest(name="guest", wait=True))


async def test_a_dictionary_of_a_site_that_the_engine_lacks_is_refused(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await admin.LoadDictionary(admin_pb2.LoadDictionaryRequest(folder="elsewhere"))

    error = CallFailed.from_rpc(refused.value)
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "DICTIONARY_MISMATCH",
    )
    assert "resid_post.3" in str(error)
