"""A good request for every RPC, and the same with one thing wrong."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from steer.v1 import activations_pb2, admin_pb2, dictionaries_pb2, info_pb2, steering_pb2

from steer_client import CallFailed, rejection
from tests.unit.serving import NAME, Serving

Fields = dict[str, Any]
PATIENCE = 5
"""Seconds after which a call that should have been refused has been accepted."""

EDIT = {"dictionary": NAME, "feature": 2, "clamp": {"value": 1.0, "unit": 1}}
READ_OUT = {"dictionary": NAME, "top_k": 2}
PROMPT = {"text": "hello"}
GENERATION = {
    "prompt": PROMPT,
    "sampling": {"max_tokens": 2},
    "edits": [EDIT],
    "read_outs": [READ_OUT],
}
GOOD: dict[str, Fields] = {
    "Generate": {"generation": GENERATION},
    "GenerateStream": {"generation": GENERATION},
    "Session": {"start_turn": {"generation": GENERATION}},
    "Update": {"update": {"edits": [EDIT], "read_outs": {"read_outs": [READ_OUT]}}},
    "Compare": {"generation": GENERATION, "arms": [{"edits": [EDIT]}]},
    "Score": {"prompt": PROMPT, "continuations": [{"text": "ab"}], "edits": [EDIT]},
    "Patch": {
        "source": {"text": "hello"},
        "target": {"text": "hulks"},
        "dictionary": NAME,
        "sets": [{"features": [1, 2]}],
        "positions": [{"source": 1, "target": 2}],
    },
    "Encode": {"prompt": PROMPT, "read_outs": [READ_OUT]},
    "Inspect": {"prompts": [PROMPT], "dictionary": NAME},
    "Contrast": {"positive": [PROMPT], "negative": [{"text": "quiet"}], "dictionary": NAME},
    "WatchStats": {},
    "ListDictionaries": {},
    "GetDictionary": {"dictionary": NAME},
    "GetFeature": {"dictionary": NAME, "feature": 3},
    "BatchGetFeatures": {"dictionary": NAME, "features": [3, 4]},
    "SearchFeatures": {"query": "names"},
    "NearestFeatures": {"dictionary": NAME, "feature": 3},
    "LoadDictionary": {"folder": "second"},
    "UnloadDictionary": {"name": "second"},
    "SetWatchList": {"features": [{"dictionary": NAME, "feature": 3}]},
    "ListSessions": {},
    "CloseSession": {},
    "Drain": {},
    "GetServerInfo": {},
}
"""By RPC; `Update` is that of a session whose turn runs."""

_METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in (steering_pb2, activations_pb2, dictionaries_pb2, admin_pb2, info_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def changed(fields: Fields, change: Mapping[str, Any]) -> Fields:
    """A copy with a value at each path; the path "" is the whole, a value of None takes away what is there."""
    fields = _copied(fields)
    for path, value in change.items():
        *way, last = re.findall(r"\w+", path)
        node: Any = fields
        for step in way:
            node = node[int(step)] if step.isdigit() else node.setdefault(step, {})
        if value is None:
            del node[last]
        else:
            node[int(last) if last.isdigit() else last] = value
    return fields


def _copied(value: Any) -> Any:
    """Nothing in it is shared, unlike in a deep copy of what shares a part."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


async def answers(service: Serving, rpc: str, fields: Fields) -> list[Message]:
    """All responses; CallFailed for an error, in an `update_rejected`, too."""
    async with asyncio.timeout(PATIENCE):
        if rpc == "Update":
            return [await _update(service, fields)]
        method = _METHODS[rpc]
        request = GetMessageClass(method.input_type)(**fields)
        service_name = method.containing_service.full_name
        factory = (
            service.channel.stream_stream if rpc == "Session" else service.channel.unary_stream
        )
        # A unary RPC is on the wire a stream of one.
        call = factory(
            f"/{service_name}/{rpc}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        try:
            return [
                response
                async for response in call(iter([request]) if rpc == "Session" else request)
            ]
        except grpc.aio.AioRpcError as error:
            raise CallFailed.from_rpc(error) from error


async def refused(service: Serving, rpc: str, change: Mapping[str, Any]) -> CallFailed:
    """How the server refuses the RPC's good request with that change."""
    with pytest.raises(CallFailed) as caught:
        await answers(service, rpc, changed(GOOD[rpc], change))
    return caught.value


@asynccontextmanager
async def held(service: Serving, fields: Fields | None = None, **options) -> AsyncIterator:
    """A session whose turn, a good one if no other is given, has begun and gets no token."""
    service.engine.steps = asyncio.Semaphore(0)
    call = service.steering.Session(**options)
    try:
        await call.write(steering_pb2.SessionRequest(**(fields or GOOD["Session"])))
        await call.read()
        yield call
    finally:
        call.cancel()
        service.engine.steps = None
        async with asyncio.timeout(PATIENCE):
            while service.engine.running:
                await asyncio.sleep(0.002)


async def _update(service: Serving, fields: Fields) -> Message:
    async with held(service) as session:
        await session.write(steering_pb2.SessionRequest(**fields))
        response = await session.read()
        if response.HasField("update_rejected"):
            raise rejection(response.update_rejected)
        return response
