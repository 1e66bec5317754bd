"""AdminService: what an operator changes while the server serves."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from steer.v1 import admin_pb2, admin_pb2_grpc

from steer_server.api.calls import Gate
from steer_server.api.dictionaries import write_dictionary
from steer_server.api.edits import check_feature
from steer_server.api.generations import Generations
from steer_server.api.residency import Residency
from steer_server.api.sessions import OpenSession, Sessions
from steer_server.config import MAX_WATCHED
from steer_server.errors import InvalidRequest

_Context = grpc.aio.ServicerContext


@dataclass(frozen=True)
class Operations:
    """The settings that AdminService acts by."""

    dictionary_root: Path | None = None
    drain_seconds: int = 30


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(
        self,
        generations: Generations,
        operations: Operations,
        sessions: Sessions,
        gate: Gate,
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        """`drain` begins to drain; whoever runs the server sees it through."""
        self._generations = generations
        self._operations = operations
        self._residency = Residency(generations, operations.dictionary_root)
        self._sessions = sessions
        self._gate = gate
        self._drain = drain

    async def LoadDictionary(
        self, request: admin_pb2.LoadDictionaryRequest, context: _Context
    ) -> admin_pb2.LoadDictionaryResponse:
        name, stored = await self._residency.load(request.folder, request.name)
        return admin_pb2.LoadDictionaryResponse(dictionary=write_dictionary(name, stored))

    async def UnloadDictionary(
        self, request: admin_pb2.UnloadDictionaryRequest, context: _Context
    ) -> admin_pb2.UnloadDictionaryResponse:
        await self._residency.unload(request.name, request.wait)
        return admin_pb2.UnloadDictionaryResponse()

    async def SetWatchList(
        self, request: admin_pb2.SetWatchListRequest, context: _Context
    ) -> admin_pb2.SetWatchListResponse:
        entries = request.features
        if len(entries) > MAX_WATCHED:
            raise InvalidRequest(
                f"{len(entries)} features; at most {MAX_WATCHED}, each is some ten series",
                field="features",
            )
        wanted: list[tuple[str, int]] = []
        for index, entry in enumerate(entries):
            path = f"features[{index}]"
            stored = self._generations.registry.get(entry.dictionary, field=f"{path}.dictionary")
            feature = check_feature(entry.feature, stored, f"{path}.feature")
            if (entry.dictionary, feature) in wanted:
                raise InvalidRequest("is listed twice", field=path)
            wanted.append((entry.dictionary, feature))
        previous = self._generations.watch.replace(wanted)
        return admin_pb2.SetWatchListResponse(
            previous=[
                admin_pb2.WatchEntry(dictionary=name, feature=feature) for name, feature in previous
            ]
        )

    async def ListSessions(
        self, request: admin_pb2.ListSessionsRequest, context: _Context
    ) -> admin_pb2.ListSessionsResponse:
        return admin_pb2.ListSessionsResponse(
            sessions=[_session(entry, time.monotonic()) for entry in self._sessions]
        )

    async def CloseSession(
        self, request: admin_pb2.CloseSessionRequest, context: _Context
    ) -> admin_pb2.CloseSessionResponse:
        self._sessions.close(request.session_id, field="session_id")
        return admin_pb2.CloseSessionResponse()

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: _Context
    ) -> admin_pb2.DrainResponse:
        await self._drain()
        return admin_pb2.DrainResponse(
            running_calls=self._gate.running - 1, drain_seconds=self._operations.drain_seconds
        )


def _session(entry: OpenSession, now: float) -> admin_pb2.SessionInfo:
    return admin_pb2.SessionInfo(
        session_id=entry.session_id,
        principal=entry.principal,
        age_seconds=now - entry.opened,
        idle_seconds=now - entry.touched,
        turns=entry.turns,
        generating=entry.generating,
    )
