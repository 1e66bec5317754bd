"""What an operator does with a server while it serves."""

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from steer.v1 import admin_pb2, admin_pb2_grpc, dictionaries_pb2

from steer_client.errors import calls


class AdminClient:
    """As `SteerClient.admin`. Each change holds for one server process and ends with it."""

    def __init__(self, channel: grpc.aio.Channel, options: Mapping[str, Any]) -> None:
        """`options` go with each call."""
        self._stub = admin_pb2_grpc.AdminServiceStub(channel)
        self._with = options

    async def load(self, folder: str, name: str = "") -> dictionaries_pb2.Dictionary:
        """Makes the dictionary in that folder of the server's dictionary_root resident."""
        request = admin_pb2.LoadDictionaryRequest(folder=folder, name=name)
        with calls():
            return (await self._stub.LoadDictionary(request, **self._with)).dictionary

    async def unload(self, name: str, *, wait: bool = False) -> None:
        """Takes a dictionary away; with `wait` once the requests that use it have ended."""
        request = admin_pb2.UnloadDictionaryRequest(name=name, wait=wait)
        with calls():
            await self._stub.UnloadDictionary(request, **self._with)

    async def watch(self, features: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Replaces the features whose activations become metrics; returns those before."""
        entries = [admin_pb2.WatchEntry(dictionary=name, feature=index) for name, index in features]
        request = admin_pb2.SetWatchListRequest(features=entries)
        with calls():
            response = await self._stub.SetWatchList(request, **self._with)
        return [(entry.dictionary, entry.feature) for entry in response.previous]

    async def sessions(self) -> list[admin_pb2.SessionInfo]:
        """The open sessions, oldest first."""
        request = admin_pb2.ListSessionsRequest()
        with calls():
            response = await self._stub.ListSessions(request, **self._with)
        return list(response.sessions)

    async def close_session(self, session_id: str) -> None:
        """Ends a session; its client sees ABORTED."""
        request = admin_pb2.CloseSessionRequest(session_id=session_id)
        with calls():
            await self._stub.CloseSession(request, **self._with)

    async def drain(self) -> admin_pb2.DrainResponse:
        """The server refuses new calls, lets running ones end, and ends itself."""
        with calls():
            return await self._stub.Drain(admin_pb2.DrainRequest(), **self._with)
