from google.rpc import status_pb2 as _status_pb2
from steer.v1 import activations_pb2 as _activations_pb2
from steer.v1 import edits_pb2 as _edits_pb2
from steer.v1 import prompt_pb2 as _prompt_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason

class Generation(_message.Message):
    __slots__ = ("prompt", "sampling", "edits", "read_outs")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    prompt: _prompt_pb2.Prompt
    sampling: Sampling
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    read_outs: _containers.RepeatedCompositeFieldContainer[_activations_pb2.ReadOut]
    def __init__(self, prompt: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., read_outs: _Optional[_Iterable[_Union[_activations_pb2.ReadOut, _Mapping]]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    logprobs: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[bool] = ...) -> None: ...

class GenerateStreamRequest(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: Generation
    def __init__(self, generation: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("started", "tokens", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    tokens: Tokens
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("request_id", "prompt", "edits", "max_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: _prompt_pb2.PromptTokens
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    max_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Union[_prompt_pb2.PromptTokens, _Mapping]] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("first_index", "ids", "text", "logprobs", "activations")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    activations: _containers.RepeatedCompositeFieldContainer[_activations_pb2.SparseActivations]
    def __init__(self, first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[float]] = ..., activations: _Optional[_Iterable[_Union[_activations_pb2.SparseActivations, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "usage", "edit_reports")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    EDIT_REPORTS_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    usage: Usage
    edit_reports: _containers.RepeatedCompositeFieldContainer[_edits_pb2.EditReport]
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., edit_reports: _Optional[_Iterable[_Union[_edits_pb2.EditReport, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "generated_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("start_turn", "update", "cancel_turn")
    START_TURN_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_TURN_FIELD_NUMBER: _ClassVar[int]
    start_turn: StartTurn
    update: UpdateEdits
    cancel_turn: CancelTurn
    def __init__(self, start_turn: _Optional[_Union[StartTurn, _Mapping]] = ..., update: _Optional[_Union[UpdateEdits, _Mapping]] = ..., cancel_turn: _Optional[_Union[CancelTurn, _Mapping]] = ...) -> None: ...

class StartTurn(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: Generation
    def __init__(self, generation: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class UpdateEdits(_message.Message):
    __slots__ = ("edits", "update_id")
    EDITS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    update_id: int
    def __init__(self, edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., update_id: _Optional[int] = ...) -> None: ...

class CancelTurn(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("turn_started", "tokens", "update_applied", "update_rejected", "turn_finished")
    TURN_STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_APPLIED_FIELD_NUMBER: _ClassVar[int]
    UPDATE_REJECTED_FIELD_NUMBER: _ClassVar[int]
    TURN_FINISHED_FIELD_NUMBER: _ClassVar[int]
    turn_started: Started
    tokens: Tokens
    update_applied: UpdateApplied
    update_rejected: UpdateRejected
    turn_finished: Finished
    def __init__(self, turn_started: _Optional[_Union[Started, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., update_applied: _Optional[_Union[UpdateApplied, _Mapping]] = ..., update_rejected: _Optional[_Union[UpdateRejected, _Mapping]] = ..., turn_finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class UpdateApplied(_message.Message):
    __slots__ = ("update_id", "revision", "first_index", "edits")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    update_id: int
    revision: int
    first_index: int
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    def __init__(self, update_id: _Optional[int] = ..., revision: _Optional[int] = ..., first_index: _Optional[int] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ...) -> None: ...

class UpdateRejected(_message.Message):
    __slots__ = ("update_id", "status")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    update_id: int
    status: _status_pb2.Status
    def __init__(self, update_id: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
