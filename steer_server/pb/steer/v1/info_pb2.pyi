from steer.v1 import dictionaries_pb2 as _dictionaries_pb2
from steer.v1 import edits_pb2 as _edits_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "vllm_version", "model", "d_model", "vocab_size", "chat", "sites", "dictionaries", "edit_kinds", "presets", "limits", "self_test_passed", "uptime_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    DICTIONARIES_FIELD_NUMBER: _ClassVar[int]
    EDIT_KINDS_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SELF_TEST_PASSED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: str
    vllm_version: str
    model: str
    d_model: int
    vocab_size: int
    chat: bool
    sites: _containers.RepeatedCompositeFieldContainer[SiteInfo]
    dictionaries: _containers.RepeatedCompositeFieldContainer[_dictionaries_pb2.Dictionary]
    edit_kinds: _containers.RepeatedScalarFieldContainer[str]
    presets: _containers.RepeatedCompositeFieldContainer[Preset]
    limits: Limits
    self_test_passed: bool
    uptime_seconds: float
    def __init__(self, version: _Optional[str] = ..., vllm_version: _Optional[str] = ..., model: _Optional[str] = ..., d_model: _Optional[int] = ..., vocab_size: _Optional[int] = ..., chat: _Optional[bool] = ..., sites: _Optional[_Iterable[_Union[SiteInfo, _Mapping]]] = ..., dictionaries: _Optional[_Iterable[_Union[_dictionaries_pb2.Dictionary, _Mapping]]] = ..., edit_kinds: _Optional[_Iterable[str]] = ..., presets: _Optional[_Iterable[_Union[Preset, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., self_test_passed: _Optional[bool] = ..., uptime_seconds: _Optional[float] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("site", "slots_used", "slots")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    site: str
    slots_used: int
    slots: int
    def __init__(self, site: _Optional[str] = ..., slots_used: _Optional[int] = ..., slots: _Optional[int] = ...) -> None: ...

class Preset(_message.Message):
    __slots__ = ("name", "description", "edits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    edits: _containers.RepeatedCompositeFieldContainer[_edits_pb2.Edit]
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., edits: _Optional[_Iterable[_Union[_edits_pb2.Edit, _Mapping]]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_model_len", "max_num_seqs", "edits", "read_outs", "features", "top_k", "updates", "request_bytes")
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_model_len: int
    max_num_seqs: int
    edits: int
    read_outs: int
    features: int
    top_k: int
    updates: int
    request_bytes: int
    def __init__(self, max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., edits: _Optional[int] = ..., read_outs: _Optional[int] = ..., features: _Optional[int] = ..., top_k: _Optional[int] = ..., updates: _Optional[int] = ..., request_bytes: _Optional[int] = ...) -> None: ...
