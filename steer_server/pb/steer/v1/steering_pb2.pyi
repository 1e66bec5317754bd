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
    FINISH_REASON_FEATURE: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_FEATURE: FinishReason

class Generation(_message.Message):
    __slots__ = ("prompt", "sampling", "edits", "read_outs", "presets", "size_limit", "stop_when")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    SIZE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    STOP_WHEN_FIELD_NUMBER: _ClassVar[int]
    prompt: _prompt_pb2.Prompt
    sampling: Sampling
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    read_outs: _containers.RepeatedCompositeFieldContainer[_activations_pb2.ReadOut]
    presets: _containers.RepeatedScalarFieldContainer[str]
    size_limit: _edits_pb2.SizeLimit
    stop_when: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Condition]
    def __init__(self, prompt: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., read_outs: _Optional[_Iterable[_Union[_activations_pb2.ReadOut, _Mapping]]] = ..., presets: _Optional[_Iterable[str]] = ..., size_limit: _Optional[_Union[_edits_pb2.SizeLimit, _Mapping]] = ..., stop_when: _Optional[_Iterable[_Union[_edits_pb2.Condition, _Mapping]]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "logprobs", "n")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    logprobs: bool
    n: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[bool] = ..., n: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: Generation
    def __init__(self, generation: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "sequences")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    started: Started
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("tokens", "finished")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    tokens: Tokens
    finished: Finished
    def __init__(self, tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("request_id", "prompt", "edits", "max_tokens", "sampling", "read_outs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: _prompt_pb2.PromptTokens
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    max_tokens: int
    sampling: Sampling
    read_outs: _containers.RepeatedCompositeFieldContainer[_activations_pb2.ReadOut]
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Union[_prompt_pb2.PromptTokens, _Mapping]] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., read_outs: _Optional[_Iterable[_Union[_activations_pb2.ReadOut, _Mapping]]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("first_index", "ids", "text", "logprobs", "activations", "sequence", "revision")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    activations: _containers.RepeatedCompositeFieldContainer[_activations_pb2.SparseActivations]
    sequence: int
    revision: int
    def __init__(self, first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[float]] = ..., activations: _Optional[_Iterable[_Union[_activations_pb2.SparseActivations, _Mapping]]] = ..., sequence: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "usage", "edit_reports", "sequence", "warnings", "stopped_by")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    EDIT_REPORTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_BY_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    usage: Usage
    edit_reports: _containers.RepeatedCompositeFieldContainer[_edits_pb2.EditReport]
    sequence: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    stopped_by: int
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., edit_reports: _Optional[_Iterable[_Union[_edits_pb2.EditReport, _Mapping]]] = ..., sequence: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., stopped_by: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("start_turn", "update", "cancel_turn", "pause", "resume")
    START_TURN_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_TURN_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    start_turn: StartTurn
    update: UpdateEdits
    cancel_turn: CancelTurn
    pause: Pause
    resume: Resume
    def __init__(self, start_turn: _Optional[_Union[StartTurn, _Mapping]] = ..., update: _Optional[_Union[UpdateEdits, _Mapping]] = ..., cancel_turn: _Optional[_Union[CancelTurn, _Mapping]] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ...) -> None: ...

class StartTurn(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: Generation
    def __init__(self, generation: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class UpdateEdits(_message.Message):
    __slots__ = ("edits", "update_id", "read_outs", "at_index", "presets", "size_limit")
    EDITS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    AT_INDEX_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    SIZE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    update_id: int
    read_outs: ReadOuts
    at_index: int
    presets: _containers.RepeatedScalarFieldContainer[str]
    size_limit: _edits_pb2.SizeLimit
    def __init__(self, edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., update_id: _Optional[int] = ..., read_outs: _Optional[_Union[ReadOuts, _Mapping]] = ..., at_index: _Optional[int] = ..., presets: _Optional[_Iterable[str]] = ..., size_limit: _Optional[_Union[_edits_pb2.SizeLimit, _Mapping]] = ...) -> None: ...

class ReadOuts(_message.Message):
    __slots__ = ("read_outs",)
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    read_outs: _containers.RepeatedCompositeFieldContainer[_activations_pb2.ReadOut]
    def __init__(self, read_outs: _Optional[_Iterable[_Union[_activations_pb2.ReadOut, _Mapping]]] = ...) -> None: ...

class CancelTurn(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pause(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Resume(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("turn_started", "tokens", "update_applied", "update_rejected", "turn_finished", "paused", "resumed", "draining")
    TURN_STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_APPLIED_FIELD_NUMBER: _ClassVar[int]
    UPDATE_REJECTED_FIELD_NUMBER: _ClassVar[int]
    TURN_FINISHED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    turn_started: Started
    tokens: Tokens
    update_applied: UpdateApplied
    update_rejected: UpdateRejected
    turn_finished: Finished
    paused: Paused
    resumed: Resumed
    draining: Draining
    def __init__(self, turn_started: _Optional[_Union[Started, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., update_applied: _Optional[_Union[UpdateApplied, _Mapping]] = ..., update_rejected: _Optional[_Union[UpdateRejected, _Mapping]] = ..., turn_finished: _Optional[_Union[Finished, _Mapping]] = ..., paused: _Optional[_Union[Paused, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class Paused(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Resumed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Draining(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: int
    def __init__(self, seconds: _Optional[int] = ...) -> None: ...

class UpdateApplied(_message.Message):
    __slots__ = ("update_id", "revision", "first_index", "edits", "read_outs")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    update_id: int
    revision: int
    first_index: int
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    read_outs: _containers.RepeatedCompositeFieldContainer[_activations_pb2.ReadOut]
    def __init__(self, update_id: _Optional[int] = ..., revision: _Optional[int] = ..., first_index: _Optional[int] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., read_outs: _Optional[_Iterable[_Union[_activations_pb2.ReadOut, _Mapping]]] = ...) -> None: ...

class UpdateRejected(_message.Message):
    __slots__ = ("update_id", "status")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    update_id: int
    status: _status_pb2.Status
    def __init__(self, update_id: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("generation", "arms")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    generation: Generation
    arms: _containers.RepeatedCompositeFieldContainer[Arm]
    def __init__(self, generation: _Optional[_Union[Generation, _Mapping]] = ..., arms: _Optional[_Iterable[_Union[Arm, _Mapping]]] = ...) -> None: ...

class Arm(_message.Message):
    __slots__ = ("edits", "presets", "size_limit")
    EDITS_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    SIZE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    presets: _containers.RepeatedScalarFieldContainer[str]
    size_limit: _edits_pb2.SizeLimit
    def __init__(self, edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., presets: _Optional[_Iterable[str]] = ..., size_limit: _Optional[_Union[_edits_pb2.SizeLimit, _Mapping]] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("arm", "started", "tokens", "finished", "divergence")
    ARM_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    arm: int
    started: Started
    tokens: Tokens
    finished: Finished
    divergence: Divergence
    def __init__(self, arm: _Optional[int] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., divergence: _Optional[_Union[Divergence, _Mapping]] = ...) -> None: ...

class Divergence(_message.Message):
    __slots__ = ("first_index", "logprob_changes", "mean_logprob_change")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_CHANGES_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOGPROB_CHANGE_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    logprob_changes: _containers.RepeatedScalarFieldContainer[float]
    mean_logprob_change: float
    def __init__(self, first_index: _Optional[int] = ..., logprob_changes: _Optional[_Iterable[float]] = ..., mean_logprob_change: _Optional[float] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("prompt", "continuations", "edits", "presets", "size_limit")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    SIZE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    prompt: _prompt_pb2.Prompt
    continuations: _containers.RepeatedCompositeFieldContainer[Continuation]
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    presets: _containers.RepeatedScalarFieldContainer[str]
    size_limit: _edits_pb2.SizeLimit
    def __init__(self, prompt: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., continuations: _Optional[_Iterable[_Union[Continuation, _Mapping]]] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ..., presets: _Optional[_Iterable[str]] = ..., size_limit: _Optional[_Union[_edits_pb2.SizeLimit, _Mapping]] = ...) -> None: ...

class Continuation(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _prompt_pb2.TokenIds
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_prompt_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("prompt", "continuations", "edits")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    prompt: _prompt_pb2.PromptTokens
    continuations: _containers.RepeatedCompositeFieldContainer[Scored]
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    def __init__(self, prompt: _Optional[_Union[_prompt_pb2.PromptTokens, _Mapping]] = ..., continuations: _Optional[_Iterable[_Union[Scored, _Mapping]]] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("tokens", "logprobs", "logprob", "edit_reports")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    EDIT_REPORTS_FIELD_NUMBER: _ClassVar[int]
    tokens: _prompt_pb2.PromptTokens
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    logprob: float
    edit_reports: _containers.RepeatedCompositeFieldContainer[_edits_pb2.EditReport]
    def __init__(self, tokens: _Optional[_Union[_prompt_pb2.PromptTokens, _Mapping]] = ..., logprobs: _Optional[_Iterable[float]] = ..., logprob: _Optional[float] = ..., edit_reports: _Optional[_Iterable[_Union[_edits_pb2.EditReport, _Mapping]]] = ...) -> None: ...

class PatchRequest(_message.Message):
    __slots__ = ("source", "target", "dictionary", "positions", "sets", "all_features", "token_ids", "top_k")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SETS_FIELD_NUMBER: _ClassVar[int]
    ALL_FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    source: _prompt_pb2.Prompt
    target: _prompt_pb2.Prompt
    dictionary: str
    positions: _containers.RepeatedCompositeFieldContainer[PositionPair]
    sets: _containers.RepeatedCompositeFieldContainer[FeatureSet]
    all_features: bool
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    def __init__(self, source: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., target: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., dictionary: _Optional[str] = ..., positions: _Optional[_Iterable[_Union[PositionPair, _Mapping]]] = ..., sets: _Optional[_Iterable[_Union[FeatureSet, _Mapping]]] = ..., all_features: _Optional[bool] = ..., token_ids: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ...) -> None: ...

class PositionPair(_message.Message):
    __slots__ = ("source", "target")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    source: int
    target: int
    def __init__(self, source: _Optional[int] = ..., target: _Optional[int] = ...) -> None: ...

class FeatureSet(_message.Message):
    __slots__ = ("features",)
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, features: _Optional[_Iterable[int]] = ...) -> None: ...

class PatchResponse(_message.Message):
    __slots__ = ("source", "target", "source_next", "target_next", "source_target_kl", "results", "differing_features")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NEXT_FIELD_NUMBER: _ClassVar[int]
    TARGET_NEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_TARGET_KL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    DIFFERING_FEATURES_FIELD_NUMBER: _ClassVar[int]
    source: _prompt_pb2.PromptTokens
    target: _prompt_pb2.PromptTokens
    source_next: NextToken
    target_next: NextToken
    source_target_kl: float
    results: _containers.RepeatedCompositeFieldContainer[PatchResult]
    differing_features: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, source: _Optional[_Union[_prompt_pb2.PromptTokens, _Mapping]] = ..., target: _Optional[_Union[_prompt_pb2.PromptTokens, _Mapping]] = ..., source_next: _Optional[_Union[NextToken, _Mapping]] = ..., target_next: _Optional[_Union[NextToken, _Mapping]] = ..., source_target_kl: _Optional[float] = ..., results: _Optional[_Iterable[_Union[PatchResult, _Mapping]]] = ..., differing_features: _Optional[_Iterable[int]] = ...) -> None: ...

class NextToken(_message.Message):
    __slots__ = ("ids", "pieces", "logprobs", "token_logprobs")
    IDS_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    pieces: _containers.RepeatedScalarFieldContainer[str]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    token_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., pieces: _Optional[_Iterable[str]] = ..., logprobs: _Optional[_Iterable[float]] = ..., token_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PatchResult(_message.Message):
    __slots__ = ("next", "source_kl", "target_kl", "edit_norm", "patched_features", "reverse_source_kl", "mean_edit_norm")
    NEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_KL_FIELD_NUMBER: _ClassVar[int]
    TARGET_KL_FIELD_NUMBER: _ClassVar[int]
    EDIT_NORM_FIELD_NUMBER: _ClassVar[int]
    PATCHED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    REVERSE_SOURCE_KL_FIELD_NUMBER: _ClassVar[int]
    MEAN_EDIT_NORM_FIELD_NUMBER: _ClassVar[int]
    next: NextToken
    source_kl: float
    target_kl: float
    edit_norm: float
    patched_features: int
    reverse_source_kl: float
    mean_edit_norm: float
    def __init__(self, next: _Optional[_Union[NextToken, _Mapping]] = ..., source_kl: _Optional[float] = ..., target_kl: _Optional[float] = ..., edit_norm: _Optional[float] = ..., patched_features: _Optional[int] = ..., reverse_source_kl: _Optional[float] = ..., mean_edit_norm: _Optional[float] = ...) -> None: ...
