"""DictionaryService: what is known of the resident dictionaries and their features."""

import asyncio
from collections.abc import Sequence

import grpc
from steer.v1 import dictionaries_pb2, dictionaries_pb2_grpc

from steer_server.api.edits import check_feature
from steer_server.api.read_outs import read_features
from steer_server.api.search import (
    MAX_QUERY_BYTES,
    Match,
    query_digest,
    read_token,
    search,
    write_token,
)
from steer_server.dictionary.card import Quality
from steer_server.dictionary.features import QUANTILES, Evidence
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import DictionaryMismatch, InvalidRequest
from steer_server.registry import Registry

DEFAULT_PAGE, MAX_PAGE = 20, 100
DEFAULT_NEAREST, MAX_NEAREST = 10, 128


class DictionaryService(dictionaries_pb2_grpc.DictionaryServiceServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListDictionaries(
        self,
        request: dictionaries_pb2.ListDictionariesRequest,
        context: grpc.aio.ServicerContext,
    ) -> dictionaries_pb2.ListDictionariesResponse:
        return dictionaries_pb2.ListDictionariesResponse(
            dictionaries=[write_dictionary(name, stored) for name, stored in self._registry]
        )

    async def GetFeature(
        self, request: dictionaries_pb2.GetFeatureRequest, context: grpc.aio.ServicerContext
    ) -> dictionaries_pb2.GetFeatureResponse:
        stored = self._registry.get(request.dictionary, field="dictionary")
        feature = check_feature(request.feature, stored, "feature")
        return dictionaries_pb2.GetFeatureResponse(
            feature=_feature(request.dictionary, stored, feature)
        )

    async def GetDictionary(
        self, request: dictionaries_pb2.GetDictionaryRequest, context: grpc.aio.ServicerContext
    ) -> dictionaries_pb2.GetDictionaryResponse:
        stored = self._registry.get(request.dictionary, field="dictionary")
        return dictionaries_pb2.GetDictionaryResponse(
            dictionary=write_dictionary(request.dictionary, stored)
        )

    async def BatchGetFeatures(
        self, request: dictionaries_pb2.BatchGetFeaturesRequest, context: grpc.aio.ServicerContext
    ) -> dictionaries_pb2.BatchGetFeaturesResponse:
        stored = self._registry.get(request.dictionary, field="dictionary")
        features = read_features(request.features, stored, "features")
        return dictionaries_pb2.BatchGetFeaturesResponse(
            features=[_feature(request.dictionary, stored, feature) for feature in features]
        )

    async def SearchFeatures(
        self, request: dictionaries_pb2.SearchFeaturesRequest, context: grpc.aio.ServicerContext
    ) -> dictionaries_pb2.SearchFeaturesResponse:
        _check_query(request.query)
        size = _read_size(request.page_size, DEFAULT_PAGE, MAX_PAGE, "page_size")
        if request.search_in not in dictionaries_pb2.SearchIn.values():
            raise InvalidRequest(
                f"{request.search_in} is neither SEARCH_IN_LABELS (1) nor SEARCH_IN_EVIDENCE (2)",
                field="search_in",
            )
        evidence = request.search_in == dictionaries_pb2.SEARCH_IN_EVIDENCE
        chosen = dict(self._registry)
        if request.dictionary:
            stored = self._registry.get(request.dictionary, field="dictionary")
            chosen = {request.dictionary: stored}
        digest = query_digest(request.query, chosen, evidence)
        first = read_token(request.page_token, digest)
        # Some 100,000 labels take longer than the tokens of other requests should wait.
        found = await asyncio.to_thread(search, request.query, chosen, evidence)
        last = first + size
        return dictionaries_pb2.SearchFeaturesResponse(
            matches=[_match(match) for match in found[first:last]],
            next_page_token=write_token(last, digest) if last < len(found) else "",
            total=len(found),
        )

    async def NearestFeatures(
        self, request: dictionaries_pb2.NearestFeaturesRequest, context: grpc.aio.ServicerContext
    ) -> dictionaries_pb2.NearestFeaturesResponse:
        stored = self._registry.get(request.dictionary, field="dictionary")
        feature = check_feature(request.feature, stored, "feature")
        among = request.among or request.dictionary
        others = self._registry.get(among, field="among")
        count = _read_size(request.top_k, DEFAULT_NEAREST, MAX_NEAREST, "top_k")
        if others.card.d_model != stored.card.d_model:
            raise DictionaryMismatch(
                f"{among!r} has d_model {others.card.d_model}, {request.dictionary!r} has "
                f"{stored.card.d_model}: their rows have no angle",
                field="among",
            )
        # A large dictionary's rows are gigabytes to read.
        found = await asyncio.to_thread(
            _nearest, stored, feature, others, count, leave_out=others is stored
        )
        return dictionaries_pb2.NearestFeaturesResponse(
            matches=[
                _match(Match(among, index, label_of(others, index), cosine))
                for index, cosine in found
            ]
        )


def label_of(stored: StoredDictionary, feature: int) -> str:
    """Empty if nobody gave it one."""
    entry = stored.evidence.get(feature)
    return entry.label if entry else ""


def _check_query(query: str) -> None:
    length = len(query.encode())
    if not query.strip():
        raise InvalidRequest("required: words to look for", field="query")
    if length > MAX_QUERY_BYTES:
        raise InvalidRequest(f"{length} bytes; at most {MAX_QUERY_BYTES}", field="query")


def _read_size(value: int, default: int, high: int, path: str) -> int:
    if value > high:
        raise InvalidRequest(f"{value} is over {high}", field=path)
    return value or default


def _nearest(
    stored: StoredDictionary, feature: int, others: StoredDictionary, count: int, leave_out: bool
) -> list[tuple[int, float]]:
    cosines = others.dictionary.cosines(stored.dictionary.W_dec[feature])
    if leave_out:
        cosines[feature] = -2.0
    # Stable: of equal ones the first.
    values, order = cosines.sort(descending=True, stable=True)
    count = min(count, len(order) - leave_out)
    return list(zip(order[:count].tolist(), values[:count].tolist(), strict=True))


def _match(match: Match) -> dictionaries_pb2.FeatureMatch:
    return dictionaries_pb2.FeatureMatch(
        dictionary=match.dictionary, index=match.feature, label=match.label, score=match.score
    )


def write_dictionary(name: str, stored: StoredDictionary) -> dictionaries_pb2.Dictionary:
    card = stored.card
    return dictionaries_pb2.Dictionary(
        name=name,
        sha256=stored.sha256,
        site=str(card.site),
        d_model=card.d_model,
        n_features=card.n_features,
        architecture=card.architecture,
        model_id=card.model.id,
        labelled_features=sum(bool(entry.label) for entry in stored.evidence.values()),
        quality=_quality(card.quality) if card.quality else None,
        k=card.k,
    )


def _quality(quality: Quality) -> dictionaries_pb2.Quality:
    return dictionaries_pb2.Quality(
        tokens=quality.tokens,
        l0=quality.l0,
        fvu=quality.fvu,
        delta_ce=quality.delta_ce,
        dead_share=quality.dead_share,
        pca_fvu=quality.pca_fvu,
    )


def _feature(name: str, stored: StoredDictionary, feature: int) -> dictionaries_pb2.Feature:
    statistics = stored.statistics
    evidence = stored.evidence.get(feature, Evidence(feature))
    levels = zip(QUANTILES, statistics.quantiles[feature].tolist(), strict=True)
    return dictionaries_pb2.Feature(
        dictionary=name,
        index=feature,
        label=evidence.label,
        density=float(statistics.density[feature]),
        mean_activation=float(statistics.mean[feature]),
        max_activation=float(statistics.max[feature]),
        quantiles=[
            dictionaries_pb2.Quantile(level=level, activation=activation)
            for level, activation in levels
        ],
        examples=[
            dictionaries_pb2.Example(tokens=example.tokens, activations=example.activations)
            for example in evidence.examples
        ],
        logits_up=_effects(evidence.logits_up),
        logits_down=_effects(evidence.logits_down),
    )


def _effects(effects: Sequence[tuple[str, float]]) -> list[dictionaries_pb2.TokenEffect]:
    return [dictionaries_pb2.TokenEffect(token=token, effect=effect) for token, effect in effects]
