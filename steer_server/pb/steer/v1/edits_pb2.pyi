from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIT_UNSPECIFIED: _ClassVar[Unit]
    UNIT_ACTIVATION: _ClassVar[Unit]
    UNIT_MAX_ACTIVATION_MULTIPLE: _ClassVar[Unit]
    UNIT_RELATIVE_NORM: _ClassVar[Unit]
    UNIT_DECODER_COEFFICIENT: _ClassVar[Unit]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_PROMPT: _ClassVar[Phase]
    PHASE_GENERATED: _ClassVar[Phase]

class Oversize(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVERSIZE_UNSPECIFIED: _ClassVar[Oversize]
    OVERSIZE_REJECT: _ClassVar[Oversize]
    OVERSIZE_CLAMP: _ClassVar[Oversize]
    OVERSIZE_WARN: _ClassVar[Oversize]
UNIT_UNSPECIFIED: Unit
UNIT_ACTIVATION: Unit
UNIT_MAX_ACTIVATION_MULTIPLE: Unit
UNIT_RELATIVE_NORM: Unit
UNIT_DECODER_COEFFICIENT: Unit
PHASE_UNSPECIFIED: Phase
PHASE_PROMPT: Phase
PHASE_GENERATED: Phase
OVERSIZE_UNSPECIFIED: Oversize
OVERSIZE_REJECT: Oversize
OVERSIZE_CLAMP: Oversize
OVERSIZE_WARN: Oversize

class Edit(_message.Message):
    __slots__ = ("dictionary", "feature", "ablate", "clamp", "scale", "add", "limit", "patch", "scope", "when")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    ABLATE_FIELD_NUMBER: _ClassVar[int]
    CLAMP_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    WHEN_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    feature: int
    ablate: Ablate
    clamp: Clamp
    scale: Scale
    add: Add
    limit: Limit
    patch: Patch
    scope: Scope
    when: Condition
    def __init__(self, dictionary: _Optional[str] = ..., feature: _Optional[int] = ..., ablate: _Optional[_Union[Ablate, _Mapping]] = ..., clamp: _Optional[_Union[Clamp, _Mapping]] = ..., scale: _Optional[_Union[Scale, _Mapping]] = ..., add: _Optional[_Union[Add, _Mapping]] = ..., limit: _Optional[_Union[Limit, _Mapping]] = ..., patch: _Optional[_Union[Patch, _Mapping]] = ..., scope: _Optional[_Union[Scope, _Mapping]] = ..., when: _Optional[_Union[Condition, _Mapping]] = ...) -> None: ...

class Ablate(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Clamp(_message.Message):
    __slots__ = ("value", "unit")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    value: float
    unit: Unit
    def __init__(self, value: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ...) -> None: ...

class Scale(_message.Message):
    __slots__ = ("factor",)
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    factor: float
    def __init__(self, factor: _Optional[float] = ...) -> None: ...

class Add(_message.Message):
    __slots__ = ("value", "unit")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    value: float
    unit: Unit
    def __init__(self, value: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ...) -> None: ...

class Limit(_message.Message):
    __slots__ = ("low", "high", "unit")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    low: float
    high: float
    unit: Unit
    def __init__(self, low: _Optional[float] = ..., high: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ...) -> None: ...

class Patch(_message.Message):
    __slots__ = ("positions", "values", "unit")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    unit: Unit
    def __init__(self, positions: _Optional[_Iterable[int]] = ..., values: _Optional[_Iterable[float]] = ..., unit: _Optional[_Union[Unit, str]] = ...) -> None: ...

class Condition(_message.Message):
    __slots__ = ("dictionary", "feature", "above")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    feature: int
    above: float
    def __init__(self, dictionary: _Optional[str] = ..., feature: _Optional[int] = ..., above: _Optional[float] = ...) -> None: ...

class Scope(_message.Message):
    __slots__ = ("phases", "exclude_positions", "positions", "windows", "token_ids", "exclude_token_ids")
    PHASES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    phases: _containers.RepeatedScalarFieldContainer[Phase]
    exclude_positions: Positions
    positions: _containers.RepeatedScalarFieldContainer[int]
    windows: _containers.RepeatedCompositeFieldContainer[Window]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    exclude_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, phases: _Optional[_Iterable[_Union[Phase, str]]] = ..., exclude_positions: _Optional[_Union[Positions, _Mapping]] = ..., positions: _Optional[_Iterable[int]] = ..., windows: _Optional[_Iterable[_Union[Window, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ..., exclude_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("positions",)
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, positions: _Optional[_Iterable[int]] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("first", "end")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    first: int
    end: int
    def __init__(self, first: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class EditReport(_message.Message):
    __slots__ = ("revision", "edit", "tokens_in_scope", "tokens_changed", "mean_relative_size", "max_relative_size")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_IN_SCOPE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    MEAN_RELATIVE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_RELATIVE_SIZE_FIELD_NUMBER: _ClassVar[int]
    revision: int
    edit: int
    tokens_in_scope: int
    tokens_changed: int
    mean_relative_size: float
    max_relative_size: float
    def __init__(self, revision: _Optional[int] = ..., edit: _Optional[int] = ..., tokens_in_scope: _Optional[int] = ..., tokens_changed: _Optional[int] = ..., mean_relative_size: _Optional[float] = ..., max_relative_size: _Optional[float] = ...) -> None: ...

class SizeLimit(_message.Message):
    __slots__ = ("max_relative_size", "oversize")
    MAX_RELATIVE_SIZE_FIELD_NUMBER: _ClassVar[int]
    OVERSIZE_FIELD_NUMBER: _ClassVar[int]
    max_relative_size: float
    oversize: Oversize
    def __init__(self, max_relative_size: _Optional[float] = ..., oversize: _Optional[_Union[Oversize, str]] = ...) -> None: ...
