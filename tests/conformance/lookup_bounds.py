"""Past the bounds of texts read, dictionaries looked up, and what operators change."""

import math

from tests.conformance.cases import INVALID, LOST, MISSING, RANGE, STATE, TAKEN, Row
from tests.conformance.requests import READ_OUT
from tests.unit.serving import NAME

LOOKUPS: list[Row] = [
    ("EncodeRequest.read_outs", INVALID, "Encode", {"read_outs": []}, "read_outs"),
    ("EncodeRequest.read_outs", INVALID, "Encode", {"read_outs": [READ_OUT] * 9}, "read_outs"),
    (
        "EncodeRequest.read_outs",
        INVALID,
        "Encode",
        {"read_outs[0].phases": [1, 2]},
        "read_outs[0].phases",
    ),
    (
        "EncodeRequest.read_outs",
        INVALID,
        "Encode",
        {"read_outs[0].skip_cached": True},
        "read_outs[0].skip_cached",
    ),
    ("ActivationService.Inspect", STATE, "Inspect", {"dictionary": "dense"}, "dictionary"),
    ("InspectRequest.aggregate", INVALID, "Inspect", {"aggregate": 5}, "aggregate"),
    ("InspectRequest.top_k", INVALID, "Inspect", {"top_k": 1025}, "top_k"),
    ("ContrastRequest.aggregate", INVALID, "Contrast", {"aggregate": 5}, "aggregate"),
    ("ContrastRequest.aggregate", INVALID, "Contrast", {"aggregate": 3}, "aggregate"),
    ("ContrastRequest.top_k", INVALID, "Contrast", {"top_k": 1025}, "top_k"),
    *(
        (f"{rpc}Request.{side}", INVALID, rpc, {side: texts}, side)
        for rpc, side in (
            ("Inspect", "prompts"),
            ("Contrast", "positive"),
            ("Contrast", "negative"),
        )
        for texts in ([], [{"text": "ab"}] * 65, [{"text": "a"}])
    ),
    *(
        (
            "WatchStatsRequest.interval_seconds",
            INVALID,
            "WatchStats",
            {"interval_seconds": seconds},
            "interval_seconds",
        )
        for seconds in (0, 0.09, 3601, math.nan, math.inf)
    ),
    ("GetFeatureRequest.feature", RANGE, "GetFeature", {"feature": 32}, "feature"),
    *(
        (
            "BatchGetFeaturesRequest.features",
            INVALID,
            "BatchGetFeatures",
            {"features": features},
            "features",
        )
        for features in ([], [1, 1], range(257))
    ),
    (
        "BatchGetFeaturesRequest.features",
        RANGE,
        "BatchGetFeatures",
        {"features": [1, 32]},
        "features[1]",
    ),
    *(
        ("SearchFeaturesRequest.query", INVALID, "SearchFeatures", {"query": query}, "query")
        for query in ("", " \t", "ä" * 129)
    ),
    ("SearchFeaturesRequest.search_in", INVALID, "SearchFeatures", {"search_in": 3}, "search_in"),
    (
        "SearchFeaturesRequest.page_size",
        INVALID,
        "SearchFeatures",
        {"page_size": 101},
        "page_size",
    ),
    (
        "SearchFeaturesRequest.page_token",
        INVALID,
        "SearchFeatures",
        {"page_token": "x"},
        "page_token",
    ),
    ("NearestFeaturesRequest.feature", RANGE, "NearestFeatures", {"feature": 32}, "feature"),
    ("NearestFeaturesRequest.among", STATE, "NearestFeatures", {"among": "wide"}, "among"),
    ("NearestFeaturesRequest.top_k", INVALID, "NearestFeatures", {"top_k": 129}, "top_k"),
    ("AdminService.LoadDictionary", STATE, "LoadDictionary", {"folder": "inner"}, ""),
    ("AdminService.LoadDictionary", LOST, "LoadDictionary", {"folder": "broken"}, ""),
    *(
        ("LoadDictionaryRequest.folder", INVALID, "LoadDictionary", {"folder": folder}, "folder")
        for folder in ("", "..", "a/b", "-x", "x" * 65)
    ),
    *(
        ("LoadDictionaryRequest.folder", MISSING, "LoadDictionary", {"folder": folder}, "folder")
        for folder in ("nothing", "link")
    ),
    *(
        ("LoadDictionaryRequest.name", INVALID, "LoadDictionary", {"name": name}, "name")
        for name in ("Upper", "-x", "x" * 65)
    ),
    ("LoadDictionaryRequest.name", TAKEN, "LoadDictionary", {"name": NAME}, "name"),
    (
        "WatchEntry.feature",
        RANGE,
        "SetWatchList",
        {"features[0].feature": 32},
        "features[0].feature",
    ),
    (
        "SetWatchListRequest.features",
        INVALID,
        "SetWatchList",
        {"features": [{"dictionary": NAME, "feature": 1}] * 2},
        "features[1]",
    ),
    (
        "SetWatchListRequest.features",
        INVALID,
        "SetWatchList",
        {"features": [{"dictionary": NAME, "feature": 1}] * 101},
        "features",
    ),
]
