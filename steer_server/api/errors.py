"""How an error looks on the wire: a status code, a reason, and details that a client can act on."""

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from steer_server import errors

DOMAIN = "steer"
RETRY_SECONDS = 1
DICTIONARY_TYPE = "steer.v1.Dictionary"
SESSION_TYPE = "steer.v1.SessionInfo"

_Code = grpc.StatusCode
_TABLE: dict[type[errors.SteerError], tuple[grpc.StatusCode, str]] = {
    errors.InvalidRequest: (_Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.UnknownFeature: (_Code.OUT_OF_RANGE, "UNKNOWN_FEATURE"),
    errors.PositionOutOfRange: (_Code.OUT_OF_RANGE, "POSITION_OUT_OF_RANGE"),
    errors.ConflictingEdits: (_Code.INVALID_ARGUMENT, "CONFLICTING_EDITS"),
    errors.PromptTooLong: (_Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
    errors.EditTooLarge: (_Code.INVALID_ARGUMENT, "EDIT_TOO_LARGE"),
    errors.NotFound: (_Code.NOT_FOUND, "NOT_FOUND"),
    errors.DictionaryNotFound: (_Code.NOT_FOUND, "DICTIONARY_NOT_FOUND"),
    errors.PresetNotFound: (_Code.NOT_FOUND, "PRESET_NOT_FOUND"),
    errors.UnsupportedModel: (_Code.FAILED_PRECONDITION, "UNSUPPORTED_MODEL"),
    errors.NameTaken: (_Code.ALREADY_EXISTS, "NAME_TAKEN"),
    errors.DictionaryMismatch: (_Code.FAILED_PRECONDITION, "DICTIONARY_MISMATCH"),
    errors.DictionaryInUse: (_Code.FAILED_PRECONDITION, "DICTIONARY_IN_USE"),
    errors.CorruptDictionary: (_Code.DATA_LOSS, "CORRUPT_DICTIONARY"),
    errors.Overloaded: (_Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.QuotaExceeded: (_Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.Unauthenticated: (_Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDenied: (_Code.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.DuplicateRequest: (_Code.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    errors.DeadlineTooShort: (_Code.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT"),
    errors.SlowReader: (_Code.ABORTED, "SLOW_READER"),
    errors.AnswerTooLarge: (_Code.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE"),
    errors.OutOfMemory: (_Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    errors.EngineUnavailable: (_Code.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
    errors.EditNotApplied: (_Code.INTERNAL, "NOT_APPLIED"),
    errors.UnsupportedVllm: (_Code.FAILED_PRECONDITION, "UNSUPPORTED_VLLM"),
    errors.WrongState: (_Code.FAILED_PRECONDITION, "WRONG_STATE"),
    errors.SessionClosed: (_Code.ABORTED, "SESSION_CLOSED"),
    errors.SessionExpired: (_Code.ABORTED, "SESSION_EXPIRED"),
    errors.SessionNotFound: (_Code.NOT_FOUND, "SESSION_NOT_FOUND"),
    errors.NotConfigured: (_Code.FAILED_PRECONDITION, "NOT_CONFIGURED"),
    errors.InvalidConfig: (_Code.FAILED_PRECONDITION, "INVALID_CONFIG"),
}

_RESOURCES: dict[type[errors.NotFound], str] = {
    errors.DictionaryNotFound: DICTIONARY_TYPE,
    errors.PresetNotFound: "steer.v1.Preset",
    errors.SessionNotFound: "steer.v1.SessionInfo",
}


def classify(kind: type[errors.SteerError]) -> tuple[grpc.StatusCode, str]:
    """Code and reason of an error class: its own, or those of its nearest base in the table."""
    for base in kind.__mro__:
        if base in _TABLE:
            return _TABLE[base]
    raise LookupError(f"{kind.__name__} has no row in the error table")


def status_of(error: errors.SteerError, request_id: str = "") -> status_pb2.Status:
    """The google.rpc.Status that tells a client of `error`."""
    code, reason = classify(type(error))
    message = f"{error.field}: {error}" if error.field else str(error)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    if error.field:
        info.metadata["field"] = error.field
    return _status(code, message, [info, *_advice(error, reason)], request_id)


def internal(request_id: str) -> status_pb2.Status:
    """What a client learns of an error that nobody foresaw."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN)
    message = f"internal error; the server's log has it under request {request_id}"
    return _status(_Code.INTERNAL, message, [info], request_id)


def reason_of(status: status_pb2.Status) -> str:
    """The reason in its ErrorInfo, which every status of this module has first."""
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return info.reason


def _advice(error: errors.SteerError, reason: str) -> list[Message]:
    details: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=str(error)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.NotFound):
        resource = error_details_pb2.ResourceInfo(
            resource_type=_RESOURCES[type(error)], resource_name=error.name, description=str(error)
        )
        details.append(resource)
    if isinstance(error, errors.Overloaded | errors.EngineUnavailable):
        retry = error_details_pb2.RetryInfo()
        quota = isinstance(error, errors.QuotaExceeded)
        seconds = error.retry_seconds if quota else RETRY_SECONDS
        retry.retry_delay.FromMicroseconds(round(seconds * 1e6))
        details.append(retry)
    if isinstance(error, errors.QuotaExceeded):
        exceeded = error_details_pb2.QuotaFailure.Violation(
            subject=error.subject, description=str(error)
        )
        details.append(error_details_pb2.QuotaFailure(violations=[exceeded]))
    if classify(type(error))[0] is _Code.FAILED_PRECONDITION:
        failure = error_details_pb2.PreconditionFailure.Violation(
            type=reason, subject=error.field, description=str(error)
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[failure]))
    return details


def _status(
    code: grpc.StatusCode, message: str, details: list[Message], request_id: str
) -> status_pb2.Status:
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
