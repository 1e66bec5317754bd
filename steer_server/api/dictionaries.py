"""DictionaryService: what is known of the resident dictionaries and their features."""

from collections.abc import Sequence

import grpc
from steer.v1 import dictionaries_pb2, dictionaries_pb2_grpc

from steer_server.api.edits import check_feature
from steer_server.dictionary.card import Quality
from steer_server.dictionary.features import QUANTILES, Evidence
from steer_server.dictionary.files import StoredDictionary
from steer_server.registry import Registry


class DictionaryService(dictionaries_pb2_grpc.DictionaryServiceServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListDictionaries(
        self,
        request: dictionaries_pb2.ListDictionariesRequest,
        context: grpc.aio.ServicerContext,
    ) -> dictionaries_pb2.ListDictionariesResponse:
        return dictionaries_pb2.ListDictionariesResponse(
            dictionaries=[_dictionary(name, stored) for name, stored in self._registry]
        )

    async def GetFeature(
        self, request: dictionaries_pb2.GetFeatureRequest, context: grpc.aio.ServicerContext
    ) -> dictionaries_pb2.GetFeatureResponse:
        stored = self._registry.get(request.dictionary, field="dictionary")
        feature = check_feature(request.feature, stored, "feature")
        return dictionaries_pb2.GetFeatureResponse(
            feature=_feature(request.dictionary, stored, feature)
        )


def _dictionary(name: str, stored: StoredDictionary) -> dictionaries_pb2.Dictionary:
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
