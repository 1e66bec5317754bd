from steer.v1 import edits_pb2 as _edits_pb2
from steer.v1 import prompt_pb2 as _prompt_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_BEFORE_EDITS: _ClassVar[Stage]
    STAGE_AFTER_EDITS: _ClassVar[Stage]

class Aggregate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGGREGATE_UNSPECIFIED: _ClassVar[Aggregate]
    AGGREGATE_MEAN: _ClassVar[Aggregate]
    AGGREGATE_MAX: _ClassVar[Aggregate]
    AGGREGATE_SUM: _ClassVar[Aggregate]
    AGGREGATE_FREQUENCY: _ClassVar[Aggregate]
STAGE_UNSPECIFIED: Stage
STAGE_BEFORE_EDITS: Stage
STAGE_AFTER_EDITS: Stage
AGGREGATE_UNSPECIFIED: Aggregate
AGGREGATE_MEAN: Aggregate
AGGREGATE_MAX: Aggregate
AGGREGATE_SUM: Aggregate
AGGREGATE_FREQUENCY: Aggregate

class ReadOut(_message.Message):
    __slots__ = ("dictionary", "top_k", "features", "above", "phases", "stage", "skip_cached")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SKIP_CACHED_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    top_k: int
    features: FeatureList
    above: Above
    phases: _containers.RepeatedScalarFieldContainer[_edits_pb2.Phase]
    stage: Stage
    skip_cached: bool
    def __init__(self, dictionary: _Optional[str] = ..., top_k: _Optional[int] = ..., features: _Optional[_Union[FeatureList, _Mapping]] = ..., above: _Optional[_Union[Above, _Mapping]] = ..., phases: _Optional[_Iterable[_Union[_edits_pb2.Phase, str]]] = ..., stage: _Optional[_Union[Stage, str]] = ..., skip_cached: _Optional[bool] = ...) -> None: ...

class Above(_message.Message):
    __slots__ = ("threshold", "row_bytes")
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    threshold: float
    row_bytes: int
    def __init__(self, threshold: _Optional[float] = ..., row_bytes: _Optional[int] = ...) -> None: ...

class FeatureList(_message.Message):
    __slots__ = ("features",)
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, features: _Optional[_Iterable[int]] = ...) -> None: ...

class SparseActivations(_message.Message):
    __slots__ = ("read_out", "dictionary", "position", "row_splits", "feature", "value", "active")
    READ_OUT_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ROW_SPLITS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    read_out: int
    dictionary: str
    position: _containers.RepeatedScalarFieldContainer[int]
    row_splits: _containers.RepeatedScalarFieldContainer[int]
    feature: _containers.RepeatedScalarFieldContainer[int]
    value: _containers.RepeatedScalarFieldContainer[float]
    active: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, read_out: _Optional[int] = ..., dictionary: _Optional[str] = ..., position: _Optional[_Iterable[int]] = ..., row_splits: _Optional[_Iterable[int]] = ..., feature: _Optional[_Iterable[int]] = ..., value: _Optional[_Iterable[float]] = ..., active: _Optional[_Iterable[int]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("prompt", "read_outs")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    prompt: _prompt_pb2.Prompt
    read_outs: _containers.RepeatedCompositeFieldContainer[ReadOut]
    def __init__(self, prompt: _Optional[_Union[_prompt_pb2.Prompt, _Mapping]] = ..., read_outs: _Optional[_Iterable[_Union[ReadOut, _Mapping]]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("tokens", "activations")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    tokens: _prompt_pb2.PromptTokens
    activations: _containers.RepeatedCompositeFieldContainer[SparseActivations]
    def __init__(self, tokens: _Optional[_Union[_prompt_pb2.PromptTokens, _Mapping]] = ..., activations: _Optional[_Iterable[_Union[SparseActivations, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("prompts", "dictionary", "aggregate", "top_k", "include_first")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FIRST_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Prompt]
    dictionary: str
    aggregate: Aggregate
    top_k: int
    include_first: bool
    def __init__(self, prompts: _Optional[_Iterable[_Union[_prompt_pb2.Prompt, _Mapping]]] = ..., dictionary: _Optional[str] = ..., aggregate: _Optional[_Union[Aggregate, str]] = ..., top_k: _Optional[int] = ..., include_first: _Optional[bool] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("features", "tokens")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[FeatureSummary]
    tokens: int
    def __init__(self, features: _Optional[_Iterable[_Union[FeatureSummary, _Mapping]]] = ..., tokens: _Optional[int] = ...) -> None: ...

class FeatureSummary(_message.Message):
    __slots__ = ("feature", "label", "mean", "max", "sum", "frequency")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_FIELD_NUMBER: _ClassVar[int]
    feature: int
    label: str
    mean: float
    max: float
    sum: float
    frequency: float
    def __init__(self, feature: _Optional[int] = ..., label: _Optional[str] = ..., mean: _Optional[float] = ..., max: _Optional[float] = ..., sum: _Optional[float] = ..., frequency: _Optional[float] = ...) -> None: ...

class ContrastRequest(_message.Message):
    __slots__ = ("positive", "negative", "dictionary", "aggregate", "top_k", "include_first")
    POSITIVE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FIRST_FIELD_NUMBER: _ClassVar[int]
    positive: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Prompt]
    negative: _containers.RepeatedCompositeFieldContainer[_prompt_pb2.Prompt]
    dictionary: str
    aggregate: Aggregate
    top_k: int
    include_first: bool
    def __init__(self, positive: _Optional[_Iterable[_Union[_prompt_pb2.Prompt, _Mapping]]] = ..., negative: _Optional[_Iterable[_Union[_prompt_pb2.Prompt, _Mapping]]] = ..., dictionary: _Optional[str] = ..., aggregate: _Optional[_Union[Aggregate, str]] = ..., top_k: _Optional[int] = ..., include_first: _Optional[bool] = ...) -> None: ...

class ContrastResponse(_message.Message):
    __slots__ = ("positive", "negative", "positive_tokens", "negative_tokens")
    POSITIVE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_FIELD_NUMBER: _ClassVar[int]
    POSITIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    positive: _containers.RepeatedCompositeFieldContainer[FeatureContrast]
    negative: _containers.RepeatedCompositeFieldContainer[FeatureContrast]
    positive_tokens: int
    negative_tokens: int
    def __init__(self, positive: _Optional[_Iterable[_Union[FeatureContrast, _Mapping]]] = ..., negative: _Optional[_Iterable[_Union[FeatureContrast, _Mapping]]] = ..., positive_tokens: _Optional[int] = ..., negative_tokens: _Optional[int] = ...) -> None: ...

class FeatureContrast(_message.Message):
    __slots__ = ("feature", "label", "difference", "positive", "negative")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    POSITIVE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_FIELD_NUMBER: _ClassVar[int]
    feature: int
    label: str
    difference: float
    positive: float
    negative: float
    def __init__(self, feature: _Optional[int] = ..., label: _Optional[str] = ..., difference: _Optional[float] = ..., positive: _Optional[float] = ..., negative: _Optional[float] = ...) -> None: ...

class WatchStatsRequest(_message.Message):
    __slots__ = ("interval_seconds",)
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    def __init__(self, interval_seconds: _Optional[float] = ...) -> None: ...

class WatchStatsResponse(_message.Message):
    __slots__ = ("features", "seconds")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[WatchedFeature]
    seconds: float
    def __init__(self, features: _Optional[_Iterable[_Union[WatchedFeature, _Mapping]]] = ..., seconds: _Optional[float] = ...) -> None: ...

class WatchedFeature(_message.Message):
    __slots__ = ("dictionary", "feature", "label", "active_tokens", "sum", "max")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    feature: int
    label: str
    active_tokens: int
    sum: float
    max: float
    def __init__(self, dictionary: _Optional[str] = ..., feature: _Optional[int] = ..., label: _Optional[str] = ..., active_tokens: _Optional[int] = ..., sum: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...
