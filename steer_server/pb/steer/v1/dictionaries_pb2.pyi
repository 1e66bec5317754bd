from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SearchIn(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEARCH_IN_UNSPECIFIED: _ClassVar[SearchIn]
    SEARCH_IN_LABELS: _ClassVar[SearchIn]
    SEARCH_IN_EVIDENCE: _ClassVar[SearchIn]
SEARCH_IN_UNSPECIFIED: SearchIn
SEARCH_IN_LABELS: SearchIn
SEARCH_IN_EVIDENCE: SearchIn

class ListDictionariesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDictionariesResponse(_message.Message):
    __slots__ = ("dictionaries",)
    DICTIONARIES_FIELD_NUMBER: _ClassVar[int]
    dictionaries: _containers.RepeatedCompositeFieldContainer[Dictionary]
    def __init__(self, dictionaries: _Optional[_Iterable[_Union[Dictionary, _Mapping]]] = ...) -> None: ...

class Dictionary(_message.Message):
    __slots__ = ("name", "sha256", "site", "d_model", "n_features", "architecture", "model_id", "labelled_features", "quality", "k")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    N_FEATURES_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    site: str
    d_model: int
    n_features: int
    architecture: str
    model_id: str
    labelled_features: int
    quality: Quality
    k: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., site: _Optional[str] = ..., d_model: _Optional[int] = ..., n_features: _Optional[int] = ..., architecture: _Optional[str] = ..., model_id: _Optional[str] = ..., labelled_features: _Optional[int] = ..., quality: _Optional[_Union[Quality, _Mapping]] = ..., k: _Optional[int] = ...) -> None: ...

class GetDictionaryRequest(_message.Message):
    __slots__ = ("dictionary",)
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    def __init__(self, dictionary: _Optional[str] = ...) -> None: ...

class GetDictionaryResponse(_message.Message):
    __slots__ = ("dictionary",)
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    dictionary: Dictionary
    def __init__(self, dictionary: _Optional[_Union[Dictionary, _Mapping]] = ...) -> None: ...

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

class BatchGetFeaturesRequest(_message.Message):
    __slots__ = ("dictionary", "features")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    features: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dictionary: _Optional[str] = ..., features: _Optional[_Iterable[int]] = ...) -> None: ...

class BatchGetFeaturesResponse(_message.Message):
    __slots__ = ("features",)
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[Feature]
    def __init__(self, features: _Optional[_Iterable[_Union[Feature, _Mapping]]] = ...) -> None: ...

class SearchFeaturesRequest(_message.Message):
    __slots__ = ("query", "dictionary", "search_in", "page_size", "page_token")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    SEARCH_IN_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    query: str
    dictionary: str
    search_in: SearchIn
    page_size: int
    page_token: str
    def __init__(self, query: _Optional[str] = ..., dictionary: _Optional[str] = ..., search_in: _Optional[_Union[SearchIn, str]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class SearchFeaturesResponse(_message.Message):
    __slots__ = ("matches", "next_page_token", "total")
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[FeatureMatch]
    next_page_token: str
    total: int
    def __init__(self, matches: _Optional[_Iterable[_Union[FeatureMatch, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., total: _Optional[int] = ...) -> None: ...

class FeatureMatch(_message.Message):
    __slots__ = ("dictionary", "index", "label", "score")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    index: int
    label: str
    score: float
    def __init__(self, dictionary: _Optional[str] = ..., index: _Optional[int] = ..., label: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class NearestFeaturesRequest(_message.Message):
    __slots__ = ("dictionary", "feature", "among", "top_k")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    AMONG_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    dictionary: str
    feature: int
    among: str
    top_k: int
    def __init__(self, dictionary: _Optional[str] = ..., feature: _Optional[int] = ..., among: _Optional[str] = ..., top_k: _Optional[int] = ...) -> None: ...

class NearestFeaturesResponse(_message.Message):
    __slots__ = ("matches",)
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[FeatureMatch]
    def __init__(self, matches: _Optional[_Iterable[_Union[FeatureMatch, _Mapping]]] = ...) -> None: ...

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
