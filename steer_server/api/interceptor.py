"""What every RPC passes through: admission, a request id, back-pressure, metrics, errors as statuses."""

import asyncio
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from steer_server.api import auth
from steer_server.api.auth import ANYONE, Metadata, Principal, TokenFile
from steer_server.api.calls import Call, Gate, check_size, enter
from steer_server.api.errors import internal, reason_of, status_of
from steer_server.api.patience import Patience
from steer_server.api.quotas import Quotas
from steer_server.api.revocation import until_revoked
from steer_server.errors import (
    DeadlineTooShort,
    DuplicateRequest,
    SlowReader,
    SteerError,
)
from steer_server.metrics import Metrics

_log = logging.getLogger(__name__)
_access = logging.getLogger("steer.access")
REQUEST_ID = "x-request-id"
_OURS = "steer.v1."
_HEALTH = "grpc.health.v1.Health"
_SESSION = ("steer.v1.SteeringService", "Session")
_SHORTEST_DEADLINE = 0.1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_TRACESTATE_LENGTH = 512


@dataclass(frozen=True)
class Policy:
    """Who may call, and how much."""

    max_calls: int = 1024
    max_sessions: int = 256
    max_sessions_per_principal: int = 8
    """Of a principal whose token says nothing of it; callers without names share `max_sessions`."""
    slow_reader_seconds: float = 60.0
    """How long a message may wait for the client to take it."""
    tokens: TokenFile | None = None
    """None: everybody may do everything."""


@dataclass
class _Record:
    """What is told of an RPC when it has ended: never a prompt, a text or an activation."""

    kind: str
    service: str
    name: str
    began: float
    request_id: str
    principal: str = ""
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    messages: int = 0

    @property
    def labels(self) -> tuple[str, str, str]:
        return self.kind, self.service, self.name

    def fields(self, peer: str, seconds: float) -> dict[str, Any]:
        """Of the access log."""
        return {
            "request_id": self.request_id,
            "method": f"{self.service}/{self.name}",
            "peer": peer,
            "principal": self.principal,
            "code": self.code.name,
            "reason": self.reason,
            "seconds": round(seconds, 6),
            "messages": self.messages,
        }


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every RPC; those of health are counted only, those of reflection need a token at most."""

    def __init__(self, gate: Gate, policy: Policy, metrics: Metrics) -> None:
        self._gate = gate
        self._policy = policy
        self._metrics = metrics
        self._quotas = Quotas(policy.max_sessions, policy.max_sessions_per_principal)
        self._running: set[str] = set()

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
            async with self._call(method, kind, context) as record:
                response = await behaviour(request, context)
                # Health's Watch has written its own.
                check_size(0 if response is None else response.ByteSize())
                record.messages += 1
                return response

        return call

    def _streaming(self, behaviour: Any, method: str, kind: str) -> Any:
        if not inspect.isasyncgenfunction(behaviour):
            # It writes through the context, as health's Watch does, and returns nothing.
            return self._unary(behaviour, method, kind)

        # Not a generator itself: a write that waits for the client can be given up here only.
        async def call(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with (
                self._call(method, kind, context) as record,
                aclosing(behaviour(request, context)) as stream,
            ):
                with closing(Patience(self._policy.slow_reader_seconds)) as patience:
                    async for response in stream:
                        await self._write(context, response, patience)
                        record.messages += 1

        return call

    async def _write(
        self, context: grpc.aio.ServicerContext, response: Any, patience: Patience
    ) -> None:
        """Returns when HTTP/2 has room for the message; SlowReader if the client makes none."""
        began = time.perf_counter()
        try:
            with patience:
                await context.write(response)
        except TimeoutError:
            self._metrics.slow_reader_aborts.inc()
            raise SlowReader(
                f"a message has waited {patience.seconds:g} s for the client to take it; read faster, "
                "or ask for less"
            ) from None
        finally:
            self._metrics.write_wait_seconds.observe(time.perf_counter() - began)

    @asynccontextmanager
    async def _call(
        self, method: str, kind: str, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[_Record]:
        service, _, name = method.lstrip("/").rpartition("/")
        metadata: Metadata = tuple(context.invocation_metadata() or ())
        record = _Record(kind, service, name, time.perf_counter(), _request_id(metadata))
        self._metrics.rpc_started.labels(*record.labels).inc()
        status = None
        try:
            with self._admission(record, metadata, context):
                if service.startswith(_OURS):
                    await context.send_initial_metadata(((REQUEST_ID, record.request_id),))
                yield record
        except grpc.aio.AbortError:
            record.code = context.code() or grpc.StatusCode.UNKNOWN
            raise
        except grpc.aio.BaseError as error:
            # Nobody is there any more to write to.
            record.code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from error
        except Exception as error:
            status = self._status(error, record)
        except BaseException:
            left = context.time_remaining()
            late = left is not None and left <= 0
            record.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        finally:
            self._ended(record, context)
        if status is not None:
            await _abort(context, status)

    @contextmanager
    def _admission(
        self, record: _Record, metadata: Metadata, context: grpc.aio.ServicerContext
    ) -> Iterator[None]:
        if record.service == _HEALTH:
            yield
            return
        principal = self._principal(metadata, context)
        record.principal = principal.name
        auth.authorise(principal, record.service)
        if not record.service.startswith(_OURS):
            with self._until_revoked(metadata, principal):
                yield
            return
        left = context.time_remaining()
        if left is not None and left < _SHORTEST_DEADLINE:
            raise DeadlineTooShort(
                f"{left:.3f} s are left; at least {_SHORTEST_DEADLINE} s are needed"
            )
        session = (record.service, record.name) == _SESSION
        with (
            self._gate.entered(),
            self._unique(record.request_id),
            self._quotas.call(principal, session=session),
            self._until_revoked(metadata, principal),
        ):
            trace = _trace_headers(metadata)
            enter(Call(record.request_id, principal, trace, self._quotas))
            yield

    def _principal(self, metadata: Metadata, context: grpc.aio.ServicerContext) -> Principal:
        if self._policy.tokens:
            return self._policy.tokens.find(auth.bearer_token(metadata))
        # There only if the client's certificate was asked for and verified.
        names = list(context.auth_context().get("x509_common_name", ()))
        return Principal(names[0].decode(errors="replace")) if names else ANYONE

    def _until_revoked(
        self, metadata: Metadata, principal: Principal
    ) -> AbstractContextManager[None]:
        if not self._policy.tokens:
            return nullcontext()
        return until_revoked(self._policy.tokens, auth.bearer_token(metadata), principal)

    @contextmanager
    def _unique(self, request_id: str) -> Iterator[None]:
        if request_id in self._running:
            raise DuplicateRequest(
                f"a call with {REQUEST_ID} {request_id} runs; wait for its end or send another id"
            )
        self._running.add(request_id)
        try:
            yield
        finally:
            self._running.discard(request_id)

    def _status(self, error: Exception, record: _Record) -> status_pb2.Status:
        if isinstance(error, SteerError):
            status = status_of(error, record.request_id)
        else:
            _log.error("request %s failed", record.request_id, exc_info=error)
            status = internal(record.request_id)
        record.code = rpc_status.to_status(status).code
        record.reason = reason_of(status)
        self._metrics.rejected.labels(record.reason).inc()
        return status

    def _ended(self, record: _Record, context: grpc.aio.ServicerContext) -> None:
        seconds = time.perf_counter() - record.began
        self._metrics.rpc_handled.labels(*record.labels, record.code.name).inc()
        self._metrics.rpc_seconds.labels(*record.labels).observe(seconds)
        # Probes come every few seconds.
        level = logging.DEBUG if record.service == _HEALTH else logging.INFO
        if _access.isEnabledFor(level):
            _access.log(level, "call", extra={"fields": record.fields(context.peer(), seconds)})


async def _abort(context: grpc.aio.ServicerContext, status: status_pb2.Status) -> None:
    try:
        await context.abort_with_status(rpc_status.to_status(status))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as error:
        # The client went away before it could be told.
        raise asyncio.CancelledError from error


def _request_id(metadata: Metadata) -> str:
    """The client's own, or a new one."""
    given = [value for key, value in metadata if key == REQUEST_ID]
    if len(given) == 1 and _REQUEST_ID.fullmatch(str(given[0])):
        return str(given[0])
    return uuid.uuid4().hex[:16]


def _trace_headers(metadata: Metadata) -> Mapping[str, str] | None:
    """The trace context as W3C writes it; one that is malformed is none."""
    found = {key: str(value) for key, value in metadata if key in ("traceparent", "tracestate")}
    if not _TRACEPARENT.fullmatch(found.get("traceparent", "")):
        return None
    if len(found.get("tracestate", "")) > _TRACESTATE_LENGTH:
        del found["tracestate"]
    return found
