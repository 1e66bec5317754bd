from steer.v1 import dictionaries_pb2 as _dictionaries_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadDictionaryRequest(_message.Message):
    __slots__ = ("folder", "name")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    folder: str
    name: str
    def __init__(self, folder: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class LoadDictionaryResponse(_message.Message):
    __slots__ = ("dictionary",)
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    dictionary: _dictionaries_pb2.Dictionary
    def __init__(self, dictionary: _Optional[_Union[_dictionaries_pb2.Dictionary, _Mapping]] = ...) -> None: ...

class UnloadDictionaryRequest(_message.Message):
    __slots__ = ("name", "wait")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    wait: bool
    def __init__(self, name: _Optional[str] = ..., wait: _Optional[bool] = ...) -> None: ...

class UnloadDictionaryResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEntry(_message.Message):
    __slots__ = ("dictionary", "feature")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    feature: int
    def __init__(self, dictionary: _Optional[str] = ..., feature: _Optional[int] = ...) -> None: ...

class SetWatchListRequest(_message.Message):
    __slots__ = ("features",)
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[WatchEntry]
    def __init__(self, features: _Optional[_Iterable[_Union[WatchEntry, _Mapping]]] = ...) -> None: ...

class SetWatchListResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: _containers.RepeatedCompositeFieldContainer[WatchEntry]
    def __init__(self, previous: _Optional[_Iterable[_Union[WatchEntry, _Mapping]]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionInfo]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionInfo, _Mapping]]] = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("session_id", "principal", "age_seconds", "idle_seconds", "turns", "generating")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    GENERATING_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    principal: str
    age_seconds: float
    idle_seconds: float
    turns: int
    generating: bool
    def __init__(self, session_id: _Optional[str] = ..., principal: _Optional[str] = ..., age_seconds: _Optional[float] = ..., idle_seconds: _Optional[float] = ..., turns: _Optional[int] = ..., generating: _Optional[bool] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("running_calls", "drain_seconds")
    RUNNING_CALLS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    running_calls: int
    drain_seconds: int
    def __init__(self, running_calls: _Optional[int] = ..., drain_seconds: _Optional[int] = ...) -> None: ...
