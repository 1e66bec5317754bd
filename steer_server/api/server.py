"""The gRPC server: its services, health and reflection, and how it starts and drains."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from steer.v1 import (
    activations_pb2,
    activations_pb2_grpc,
    admin_pb2,
    admin_pb2_grpc,
    dictionaries_pb2,
    dictionaries_pb2_grpc,
    info_pb2,
    info_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
)

from steer_server.api.activations import ActivationService
from steer_server.api.admin import AdminService, Operations
from steer_server.api.calls import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, Gate
from steer_server.api.dictionaries import DictionaryService
from steer_server.api.generations import Generations
from steer_server.api.info import ServerInfoService
from steer_server.api.interceptor import CallInterceptor, Policy
from steer_server.api.session import SessionLimits
from steer_server.api.sessions import Sessions
from steer_server.api.steering import SteeringService
from steer_server.api.tls import TlsFiles, credentials
from steer_server.errors import InvalidConfig
from steer_server.metrics import Metrics

SERVICES = (
    steering_pb2.DESCRIPTOR.services_by_name["SteeringService"].full_name,
    activations_pb2.DESCRIPTOR.services_by_name["ActivationService"].full_name,
    dictionaries_pb2.DESCRIPTOR.services_by_name["DictionaryService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
    info_pb2.DESCRIPTOR.services_by_name["ServerInfoService"].full_name,
)
_LAST_ANSWERS_SECONDS = 1
_STOP_SECONDS = 5

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    ("grpc.max_metadata_size", 8 << 10),
    # Between the two gRPC refuses by chance.
    ("grpc.absolute_max_metadata_size", 8 << 10),
    # A second server on the port would share its calls in silence.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client may ping while the engine takes its time over a token.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)


def address(host: str, port: int) -> str:
    """Both as one text; IPv6 needs brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Health(health.aio.HealthServicer):  # pyright: ignore[reportAttributeAccessIssue]
    """With List, which the library leaves out although reflection tells of it."""

    # The types that pyright knows are older than the method.
    async def List(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        asked = {name: health_pb2.HealthCheckRequest(service=name) for name in ("", *SERVICES)}
        statuses = {name: await self.Check(one, context) for name, one in asked.items()}
        response: Any = health_pb2.HealthListResponse  # pyright: ignore[reportAttributeAccessIssue]
        return response(statuses=statuses)


class Server:
    """Binds early, so that a taken port is known before a model is loaded; serves when started."""

    def __init__(self, metrics: Metrics, policy: Policy = Policy()) -> None:  # noqa: B008 - frozen
        self._gate = Gate(policy.max_calls)
        self._health = _Health()
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(self._gate, policy, metrics)], options=_OPTIONS
        )

    def bind(self, host: str, port: int, tls: TlsFiles | None = None) -> int:
        """The port, which the system chooses for 0."""
        try:
            if tls:
                return self._server.add_secure_port(address(host, port), credentials(tls))
            return self._server.add_insecure_port(address(host, port))
        except RuntimeError as error:
            raise InvalidConfig(
                f"cannot listen on {address(host, port)}; is it taken?", field="port"
            ) from error

    @property
    def draining(self) -> asyncio.Event:
        """Set once a drain has begun, by `drain` or by a call."""
        return self._gate.draining

    async def start(
        self,
        generations: Generations,
        operations: Operations = Operations(),  # noqa: B008 - frozen
        limits: SessionLimits = SessionLimits(),  # noqa: B008 - frozen
    ) -> None:
        """Begins to listen; until `open` only health and reflection answer."""
        sessions = Sessions()
        self._gate.drain_seconds = operations.drain_seconds
        steering_pb2_grpc.add_SteeringServiceServicer_to_server(
            SteeringService(generations, self._gate, sessions, limits), self._server
        )
        activations_pb2_grpc.add_ActivationServiceServicer_to_server(
            ActivationService(generations, self._gate), self._server
        )
        dictionaries_pb2_grpc.add_DictionaryServiceServicer_to_server(
            DictionaryService(generations.registry), self._server
        )
        admin = AdminService(generations, operations, sessions, self._gate, self._begin_drain)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._server)
        info_pb2_grpc.add_ServerInfoServiceServicer_to_server(
            ServerInfoService(generations.served), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def open(self) -> None:
        """Admits calls and tells health so."""
        self._gate.ready = True
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, seconds: float) -> None:
        """Refuses new calls and returns when the running ones have ended, after `seconds` at most."""
        self._gate.drain_seconds = seconds
        await self._begin_drain()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._gate.idle.wait(), seconds)

    async def _begin_drain(self) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._gate.draining.set()

    async def fail(self) -> None:
        """Tells health that the process should be replaced."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self) -> None:
        """Aborts what still runs, and closes the port."""
        # What a call that has ended said last may still be on its way.
        grace = _LAST_ANSWERS_SECONDS if self._gate.idle.is_set() else 0
        # grpc.aio may hang here (grpc issue 40989); the process ends in any case.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._server.stop(grace), _STOP_SECONDS)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in SERVICES:
            await self._health.set(name, status)
