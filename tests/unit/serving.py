"""A real gRPC server over a fake engine, and the dictionary it serves."""

import functools
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from steer.v1 import (
    activations_pb2_grpc,
    admin_pb2_grpc,
    dictionaries_pb2_grpc,
    info_pb2_grpc,
    steering_pb2_grpc,
)

from steer_client import CallFailed
from steer_server.api.admin import Operations
from steer_server.api.generations import Generations
from steer_server.api.interceptor import Policy
from steer_server.api.presets import Presets
from steer_server.api.server import Server
from steer_server.api.session import SessionLimits
from steer_server.api.tls import TlsFiles
from steer_server.dictionary.card import Card, Model, Quality
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import Evidence, Example, FeatureStatistics
from steer_server.dictionary.files import StoredDictionary, load, save
from steer_server.dictionary.site import Site
from steer_server.metrics import Metrics
from steer_server.registry import Registry
from tests.unit.fake_engine import FakeEngine

D_MODEL, N_FEATURES = 8, 32
NAME = "small"
NEVER_FIRED = 31
INPUT_SCALE = 0.5


def card_for(dictionary: Dictionary, name: str = NAME) -> Card:
    return Card.of(
        dictionary,
        name=name,
        model=Model("fake", "", "0"),
        site=Site.parse("resid_post.1"),
        architecture="tied_relu",
        quality=Quality(1000, 12.0, 0.1, 0.02, 0.0, 0.5),
    )


@functools.cache
def small_dictionary() -> StoredDictionary:
    """32 features of an 8-dimensional x; statistics say that feature i had a largest activation of i + 1."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(N_FEATURES, D_MODEL, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    dictionary = Dictionary.tied(rows, torch.full((N_FEATURES,), -0.2), input_scale=INPUT_SCALE)
    zeros = FeatureStatistics.zeros(N_FEATURES)
    largest = torch.arange(1.0, N_FEATURES + 1)
    largest[NEVER_FIRED] = 0
    statistics = FeatureStatistics(zeros.density + 0.25, largest / 2, largest, zeros.quantiles)
    evidence = [
        Evidence(
            3, "names", (Example(("a", "b"), (0.0, 2.0)),), ((" Mary", 1.5),), ((" the", -1.0),)
        )
    ]
    folder = Path(tempfile.mkdtemp()) / NAME
    save(folder, card_for(dictionary), dictionary, statistics, evidence)
    return load(folder)


@dataclass
class Serving:
    engine: FakeEngine
    server: Server
    metrics: Metrics
    generations: Generations
    target: str
    channel: grpc.aio.Channel

    @property
    def steering(self):
        return steering_pb2_grpc.SteeringServiceStub(self.channel)

    @property
    def activations(self):
        return activations_pb2_grpc.ActivationServiceStub(self.channel)

    @property
    def dictionaries(self):
        return dictionaries_pb2_grpc.DictionaryServiceStub(self.channel)

    @property
    def admin(self):
        return admin_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def info(self):
        return info_pb2_grpc.ServerInfoServiceStub(self.channel)

    def metric(self, name: str, **labels: str) -> float:
        """The value of the one sample with these labels; 0 if there is none."""
        text = generate_latest(self.metrics.registry).decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@asynccontextmanager
async def serving(
    watch: Mapping[str, Sequence[int]] | None = None,
    max_calls: int = 100,
    ready: bool = True,
    tls: TlsFiles | None = None,
    policy: Policy = Policy(),  # noqa: B008 - frozen
    operations: Operations | None = None,
    more: Mapping[str, StoredDictionary] | None = None,
    presets: Presets | None = None,
    limits: SessionLimits = SessionLimits(),  # noqa: B008 - frozen
) -> AsyncIterator[Serving]:
    """The server on a free port with the small dictionary and `more`, and a channel to it, which is of no use with TLS."""
    engine = FakeEngine(D_MODEL)
    registry = Registry()
    for name, stored in {NAME: small_dictionary(), **(more or {})}.items():
        registry.add(name, stored)
        await engine.add_dictionary(name, stored)
    metrics = Metrics("fake", registry, watch or {})
    metrics.watch_engine(engine)
    server = Server(metrics, replace(policy, max_calls=max_calls))
    target = f"127.0.0.1:{server.bind('127.0.0.1', 0, tls)}"
    generations = Generations(engine, registry, metrics, watch or {}, presets)
    await server.start(generations, operations or Operations(), limits)
    if ready:
        await server.open()
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            yield Serving(engine, server, metrics, generations, target, channel)
        finally:
            await server.stop()


async def collect(call) -> list:
    """All responses of a stream; CallFailed if it ends with an error."""
    try:
        return [response async for response in call]
    except grpc.aio.AioRpcError as error:
        raise CallFailed.from_rpc(error) from error
