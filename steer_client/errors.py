"""What a failed call says."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

_DETAILS: tuple[type[Message], ...] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.RetryInfo,
    error_details_pb2.RequestInfo,
)


class CallFailed(Exception):
    """A call ended with an error; `str()` of it is the server's message."""

    def __init__(self, code: grpc.StatusCode, message: str, status: status_pb2.Status) -> None:
        """`status` may be empty: the network, or a proxy, says less than the server does."""
        super().__init__(message)
        self.code = code
        self.status = status
        found = {type(detail): detail for detail in _unpack(status)}
        info = found.get(error_details_pb2.ErrorInfo, error_details_pb2.ErrorInfo())
        retry = found.get(error_details_pb2.RetryInfo)
        request = found.get(error_details_pb2.RequestInfo, error_details_pb2.RequestInfo())
        self.reason: str = info.reason
        """Such as UNKNOWN_FEATURE; empty if it did not come from the server."""
        self.field: str = info.metadata.get("field", "")
        """Proto path of the value at fault, such as generation.edits[2].clamp.value."""
        self.request_id: str = request.request_id
        self.retry_seconds: float | None = None
        """After which the same call may succeed; None: it will not."""
        if retry is not None:
            self.retry_seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9

    @classmethod
    def from_rpc(cls, error: grpc.aio.AioRpcError) -> "CallFailed":
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        return cls(
            error.code(), error.details() or error.code().name, status or status_pb2.Status()
        )

    @classmethod
    def from_status(cls, status: status_pb2.Status) -> "CallFailed":
        """As an `update_rejected` carries it."""
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        return cls(code, status.message, status)


@contextmanager
def calls() -> Iterator[None]:
    """Turns grpc's error into CallFailed."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise CallFailed.from_rpc(error) from error


def _unpack(status: status_pb2.Status) -> Iterator:
    for packed in status.details:
        for kind in _DETAILS:
            if packed.Is(kind.DESCRIPTOR):  # type: ignore[arg-type]
                detail = kind()
                packed.Unpack(detail)
                yield detail
