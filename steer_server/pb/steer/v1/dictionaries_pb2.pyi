from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListDictionariesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDictionariesResponse(_message.Message):
    __slots__ = ("dictionaries",)
    DICTIONARIES_FIELD_NUMBER: _ClassVar[int]
    dictionaries: _containers.RepeatedCompositeFieldContainer[Dictionary]
    def __init__(self, dictionaries: _Optional[_Iterable[_Union[Dictionary, _Mapping]]] = ...) -> None: ...

class Dictionary(_message.Message):
    __slots__ = ("name", "sha256", "site", "d_model", "n_features", "architecture", "model_id", "labelled_features", "quality")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    N_FEATURES_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    site: str
    d_model: int
    n_features: int
    architecture: str
    model_id: str
    labelled_features: int
    quality: Quality
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., site: _Optional[str] = ..., d_model: _Optional[int] = ..., n_features: _Optional[int] = ..., architecture: _Optional[str] = ..., model_id: _Optional[str] = ..., labelled_features: _Optional[int] = ..., quality: _Optional[_Union[Quality, _Mapping]] = ...) -> None: ...

class Quality(_message.Message):
    __slots__ = ("tokens", "l0", "fvu", "delta_ce", "dead_share", "pca_fvu")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    L0_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    DELTA_CE_FIELD_NUMBER: _ClassVar[int]
    DEAD_SHARE_FIELD_NUMBER: _ClassVar[int]
    PCA_FVU_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    l0: float
    fvu: float
    delta_ce: float
    dead_share: float
    pca_fvu: float
    def __init__(self, tokens: _Optional[int] = ..., l0: _Optional[float] = ..., fvu: _Optional[float] = ..., delta_ce: _Optional[float] = ..., dead_share: _Optional[float] = ..., pca_fvu: _Optional[float] = ...) -> None: ...

class GetFeatureRequest(_message.Message):
    __slots__ = ("dictionary", "feature")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    feature: int
    def __init__(self, dictionary: _Optional[str] = ..., feature: _Optional[int] = ...) -> None: ...

class GetFeatureResponse(_message.Message):
    __slots__ = ("feature",)
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    feature: Feature
    def __init__(self, feature: _Optional[_Union[Feature, _Mapping]] = ...) -> None: ...

class Feature(_message.Message):
    __slots__ = ("dictionary", "index", "label", "density", "mean_activation", "max_activation", "quantiles", "examples", "logits_up", "logits_down")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    MEAN_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_UP_FIELD_NUMBER: _ClassVar[int]
    LOGITS_DOWN_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    index: int
    label: str
    density: float
    mean_activation: float
    max_activation: float
    quantiles: _containers.RepeatedCompositeFieldContainer[Quantile]
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    logits_up: _containers.RepeatedCompositeFieldContainer[TokenEffect]
    logits_down: _containers.RepeatedCompositeFieldContainer[TokenEffect]
    def __init__(self, dictionary: _Optional[str] = ..., index: _Optional[int] = ..., label: _Optional[str] = ..., density: _Optional[float] = ..., mean_activation: _Optional[float] = ..., max_activation: _Optional[float] = ..., quantiles: _Optional[_Iterable[_Union[Quantile, _Mapping]]] = ..., examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., logits_up: _Optional[_Iterable[_Union[TokenEffect, _Mapping]]] = ..., logits_down: _Optional[_Iterable[_Union[TokenEffect, _Mapping]]] = ...) -> None: ...

class Quantile(_message.Message):
    __slots__ = ("level", "activation")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    level: float
    activation: float
    def __init__(self, level: _Optional[float] = ..., activation: _Optional[float] = ...) -> None: ...

class Example(_message.Message):
    __slots__ = ("tokens", "activations")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    activations: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, tokens: _Optional[_Iterable[str]] = ..., activations: _Optional[_Iterable[float]] = ...) -> None: ...

class TokenEffect(_message.Message):
    __slots__ = ("token", "effect")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    token: str
    effect: float
    def __init__(self, token: _Optional[str] = ..., effect: _Optional[float] = ...) -> None: ...
