"""One eager engine and one reference model for all end-to-end tests, and what each of several processes runs of them."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from steer_client import SteerClient
from steer_server.api.generations import Generations
from steer_server.api.server import Server
from steer_server.dictionary.files import StoredDictionary
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.metrics import Metrics
from steer_server.registry import Registry
from tests.conftest import SITE
from tests.e2e import lanes
from tests.e2e.engines import MODES, modes_of, started
from tests.e2e.reference import Reference

# Engines of several processes share the cores, and the kernel knows best which is free. It is a part of the compile
# cache's key, too, so that it must be the same for our engine, which would set it, and for plain vLLM.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lane",
        type=lanes.parse,
        metavar="I/N",
        help="run the I-th of N parts of the end-to-end tests, which take about as long",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.lane is None:
        return
    index, count = config.option.lane
    groups = {item: _group(item) for item in items}
    mine = lanes.lanes(set(groups.values()), count)[index]
    config.hook.pytest_deselected(items=[item for item in items if groups[item] not in mine])
    items[:] = [item for item in items if groups[item] in mine]


def _group(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    shared = "engine" in fixtures and not hasattr(getattr(item, "module", None), "engine")
    return lanes.SHARED if shared else item.path.stem


@pytest.fixture(scope="session")
async def engine(
    model_path: Path, random_dictionary: StoredDictionary
) -> AsyncIterator[VllmEngine]:
    settings = EngineSettings(
        str(model_path),
        (SITE,),
        max_model_len=1024,
        max_num_seqs=16,
        # Prompts of the longer tests come in chunks.
        max_num_batched_tokens=128,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
    )
    dictionaries = {"random": random_dictionary}
    async with started(settings, dictionaries, kernels="kernels" in MODES) as engine:
        assert modes_of(engine) == MODES
        yield engine


@pytest.fixture(scope="session")
def reference(model_path: Path, random_dictionary: StoredDictionary) -> Reference:
    return Reference(model_path, SITE.layer, random_dictionary.dictionary)


@pytest.fixture(scope="session")
async def target(engine: VllmEngine, random_dictionary: StoredDictionary) -> AsyncIterator[str]:
    """Where the gRPC server of the engine listens."""
    registry = Registry()
    registry.add("random", random_dictionary)
    metrics = Metrics(engine.model_id, registry, {"random": [1]})
    server = Server(metrics)
    port = server.bind("127.0.0.1", 0)
    await server.start(Generations(engine, registry, metrics, {"random": [1]}))
    await server.open()
    yield f"127.0.0.1:{port}"
    await server.stop()


@pytest.fixture(scope="session")
async def client(target: str) -> AsyncIterator[SteerClient]:
    async with SteerClient(target) as client:
        yield client
