"""What every RPC passes through: admission, a request id, metrics, and errors as statuses."""

import asyncio
import inspect
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from steer_server.api.errors import internal, reason_of, status_of
from steer_server.errors import EngineUnavailable, Overloaded, SteerError
from steer_server.metrics import Metrics

_log = logging.getLogger(__name__)
_request_id: ContextVar[str] = ContextVar("request_id")
_OURS = "steer.v1."
MAX_REQUEST_BYTES = 4 << 20


def request_id() -> str:
    """The id of the RPC that this task serves."""
    return _request_id.get()


class Gate:
    """Admits RPCs while the server is ready, and counts those that run."""

    def __init__(self, limit: int) -> None:
        self.ready = False
        self.draining = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self._limit = limit
        self._running = 0

    @property
    def running(self) -> int:
        """Calls that were admitted and have not ended."""
        return self._running

    def enter(self) -> None:
        if self.draining.is_set():
            raise EngineUnavailable("the server is shutting down; try another one")
        if not self.ready:
            raise EngineUnavailable("the server is starting")
        if self._running >= self._limit:
            raise Overloaded(f"{self._running} calls run, as many as may")
        self._running += 1
        self.idle.clear()

    def leave(self) -> None:
        self._running -= 1
        if not self._running:
            self.idle.set()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every RPC; those of health and reflection are counted only."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        codecs = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            call = self._unary(handler.unary_unary, method, "unary")
            return grpc.unary_unary_rpc_method_handler(call, *codecs)
        if handler.unary_stream:
            call = self._streaming(handler.unary_stream, method, "server_stream")
            return grpc.unary_stream_rpc_method_handler(call, *codecs)
        assert handler.stream_stream, "no service here takes a stream and answers once"
        call = self._streaming(handler.stream_stream, method, "bidi_stream")
        return grpc.stream_stream_rpc_method_handler(call, *codecs)

    def _unary(self, behaviour: Any, method: str, kind: str) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._call(method, kind, context):
                return await behaviour(request, context)

        return call

    def _streaming(self, behaviour: Any, method: str, kind: str) -> Any:
        if not inspect.isasyncgenfunction(behaviour):
            # It writes through the context, as health's Watch does, and returns nothing.
            return self._unary(behaviour, method, kind)

        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncGenerator:
            # grpc does not close a handler that waits in a yield when the client goes away; the
            # event loop does, as soon as grpc drops it.
            async with (
                self._call(method, kind, context),
                aclosing(behaviour(request, context)) as stream,
            ):
                async for response in stream:
                    yield response

        return call

    @asynccontextmanager
    async def _call(
        self, method: str, kind: str, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[None]:
        service, _, name = method.lstrip("/").rpartition("/")
        labels = (kind, service, name)
        began = time.perf_counter()
        self._metrics.rpc_started.labels(*labels).inc()
        _request_id.set(uuid.uuid4().hex[:16])
        code = grpc.StatusCode.OK
        try:
            async with self._admission(service):
                yield
        except grpc.aio.AbortError:
            code = context.code() or grpc.StatusCode.UNKNOWN
            raise
        except Exception as error:
            status = self._status(error)
            grpc_status = rpc_status.to_status(status)
            code = grpc_status.code
            await context.abort_with_status(grpc_status)
        except BaseException:
            left = context.time_remaining()
            late = left is not None and left <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        finally:
            self._metrics.rpc_handled.labels(*labels, code.name).inc()
            self._metrics.rpc_seconds.labels(*labels).observe(time.perf_counter() - began)

    @asynccontextmanager
    async def _admission(self, service: str) -> AsyncIterator[None]:
        if not service.startswith(_OURS):
            yield
            return
        self._gate.enter()
        try:
            yield
        finally:
            self._gate.leave()

    def _status(self, error: Exception) -> status_pb2.Status:
        if isinstance(error, SteerError):
            status = status_of(error, request_id())
        else:
            _log.error("request %s failed", request_id(), exc_info=error)
            status = internal(request_id())
        self._metrics.rejected.labels(reason_of(status)).inc()
        return status
