"""For each bound in the protos' comments: requests past it, and the field that the refusal has to name."""

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from steer.v1 import dictionaries_pb2, steering_pb2

from steer_client import CallFailed, rejection
from steer_server import memory
from tests.conformance.contract import Bound
from tests.conformance.requests import GOOD, READ_OUT, held, refused
from tests.unit.serving import NAME, NEVER_FIRED, Serving, serving

Change = Mapping[str, Any]
Ask = Callable[[Serving], Awaitable[CallFailed]]

INVALID, RANGE, MISSING, STATE, FULL, TAKEN, LOST = (
    "INVALID_ARGUMENT",
    "OUT_OF_RANGE",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "ALREADY_EXISTS",
    "DATA_LOSS",
)


@dataclass(frozen=True)
class Case:
    """One way past a bound."""

    bound: Bound
    rpc: str
    field: str
    """That ErrorInfo and BadRequest name; empty where no value of the request is at fault."""
    ask: Ask

    @property
    def name(self) -> str:
        return f"{self.bound[0]}-{self.bound[1]}-{self.rpc}-{self.field}"


_GENERATIONS = (
    ("Generate", "generation"),
    ("GenerateStream", "generation"),
    ("Session", "start_turn.generation"),
    ("Compare", "generation"),
)
_BEGUN = (*_GENERATIONS, ("Compare", "arms[0]"), ("Score", ""))
CARRIERS: dict[str, tuple[tuple[str, str], ...]] = {
    "generation": _GENERATIONS,
    "edits, begun": _BEGUN,
    "edits": (*_BEGUN, ("Update", "update")),
    "read_outs": (*_GENERATIONS, ("Encode", ""), ("Update", "update.read_outs")),
    "prompt": (
        *((rpc, f"{path}.prompt") for rpc, path in _GENERATIONS),
        ("Encode", "prompt"),
        ("Score", "prompt"),
        ("Patch", "source"),
        ("Patch", "target"),
        ("Inspect", "prompts[0]"),
        ("Contrast", "positive[0]"),
        ("Contrast", "negative[0]"),
    ),
}
"""Where messages that several RPCs take lie in each: an RPC and the path of what holds them."""


def _under(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


def _past(name: str, code: str, where: str, change: Change, field: str | None) -> Iterator[Case]:
    """Cases for every place of a shared message, or for the one RPC `where`; paths count from there."""
    for rpc, prefix in CARRIERS.get(where, ((where, ""),)):
        absolute = {_under(prefix, path): value for path, value in change.items()}

        def ask(service: Serving, rpc=rpc, absolute=absolute) -> Awaitable[CallFailed]:
            return refused(service, rpc, absolute)

        yield Case((name, code), rpc, "" if field is None else _under(prefix, field), ask)


_Row = tuple[str, str, str, Change, str | None]
"""What names the bound, the code, where the message lies, what is wrong, and which field, if one, is named."""


def edit(**fields) -> dict[str, Any]:
    return {"dictionary": NAME, "feature": 2, **fields}


def scope(**fields) -> Change:
    return {"edits": [edit(ablate={}, scope=fields)]}


def when(**fields) -> Change:
    return {"edits": [edit(ablate={}, when=fields)]}


def patch(positions: list[int], values: list[float], unit: int = 1) -> Change:
    return {"edits": [edit(patch={"positions": positions, "values": values, "unit": unit})]}


def above(**fields) -> Change:
    return {"read_outs": [{"dictionary": NAME, "above": fields}]}


def named(features: list[int]) -> Change:
    return {"read_outs": [{"dictionary": NAME, "features": {"features": features}}]}


def chat(*roles: int) -> Change:
    return {"": {"chat": {"messages": [{"role": role, "content": "a"} for role in roles]}}}


_UNKNOWN = [
    ("Edit.dictionary", "edits", "edits[0].dictionary"),
    ("ReadOut.dictionary", "read_outs", "read_outs[0].dictionary"),
    ("InspectRequest.dictionary", "Inspect", "dictionary"),
    ("ContrastRequest.dictionary", "Contrast", "dictionary"),
    ("GetDictionaryRequest.dictionary", "GetDictionary", "dictionary"),
    ("GetFeatureRequest.dictionary", "GetFeature", "dictionary"),
    ("BatchGetFeaturesRequest.dictionary", "BatchGetFeatures", "dictionary"),
    ("SearchFeaturesRequest.dictionary", "SearchFeatures", "dictionary"),
    ("NearestFeaturesRequest.dictionary", "NearestFeatures", "dictionary"),
    ("NearestFeaturesRequest.among", "NearestFeatures", "among"),
    ("UnloadDictionaryRequest.name", "UnloadDictionary", "name"),
    ("WatchEntry.dictionary", "SetWatchList", "features[0].dictionary"),
    ("PatchRequest.dictionary", "Patch", "dictionary"),
    ("CloseSessionRequest.session_id", "CloseSession", "session_id"),
]
"""Names of what is not there."""

_EDITS: list[_Row] = [
    ("Edit.feature", RANGE, "edits", {"edits[0].feature": 32}, "edits[0].feature"),
    (
        "Edit.feature",
        INVALID,
        "edits",
        {"edits": [edit(ablate={}), edit(scale={"factor": 2})]},
        "edits[1].feature",
    ),
    ("Edit.kind", INVALID, "edits", {"edits[0].clamp": None}, "edits[0].kind"),
    (
        "Edit.scope",
        INVALID,
        "edits, begun",
        scope(phases=[1], exclude_positions={"positions": range(5)}),
        "edits[0].scope",
    ),
    ("Clamp.value", INVALID, "edits", {"edits[0].clamp.value": math.nan}, "edits[0].clamp.value"),
    ("Clamp.unit", INVALID, "edits", {"edits[0].clamp.unit": 0}, "edits[0].clamp.unit"),
    ("Clamp.unit", INVALID, "edits", {"edits[0].clamp.unit": 3}, "edits[0].clamp.unit"),
    ("Clamp.unit", INVALID, "edits", {"edits[0].clamp.unit": 9}, "edits[0].clamp.unit"),
    (
        "Scale.factor",
        INVALID,
        "edits",
        {"edits": [edit(scale={"factor": -math.inf})]},
        "edits[0].scale.factor",
    ),
    (
        "Add.value",
        INVALID,
        "edits",
        {"edits": [edit(add={"value": math.inf, "unit": 3})]},
        "edits[0].add.value",
    ),
    ("Add.unit", INVALID, "edits", {"edits": [edit(add={"value": 1})]}, "edits[0].add.unit"),
    (
        "Limit.low",
        INVALID,
        "edits",
        {"edits": [edit(limit={"low": math.nan, "unit": 1})]},
        "edits[0].limit.low",
    ),
    (
        "Limit.low",
        INVALID,
        "edits",
        {"edits": [edit(limit={"low": 2, "high": 1, "unit": 1})]},
        "edits[0].limit.low",
    ),
    (
        "Limit.high",
        INVALID,
        "edits",
        {"edits": [edit(limit={"high": math.nan, "unit": 1})]},
        "edits[0].limit.high",
    ),
    ("Limit.high", INVALID, "edits", {"edits": [edit(limit={"unit": 1})]}, "edits[0].limit"),
    ("Limit.unit", INVALID, "edits", {"edits": [edit(limit={"low": 1})]}, "edits[0].limit.unit"),
    (
        "Limit.unit",
        INVALID,
        "edits",
        {"edits": [edit(limit={"low": 1, "unit": 3})]},
        "edits[0].limit.unit",
    ),
    ("Patch.positions", INVALID, "edits", patch([], []), "edits[0].patch.positions"),
    (
        "Patch.positions",
        INVALID,
        "edits",
        patch(list(range(4097)), [1.0] * 4097),
        "edits[0].patch.positions",
    ),
    ("Patch.positions", INVALID, "edits", patch([1, 1], [1, 2]), "edits[0].patch.positions[1]"),
    ("Patch.positions", INVALID, "edits", patch([-6], [1]), "edits[0].patch.positions"),
    ("Patch.values", INVALID, "edits", patch([1, 2], [1]), "edits[0].patch.values"),
    ("Patch.values", INVALID, "edits", patch([1], [math.inf]), "edits[0].patch.values[0]"),
    ("Patch.unit", INVALID, "edits", patch([1], [1], 0), "edits[0].patch.unit"),
    ("Patch.unit", INVALID, "edits", patch([1], [1], 3), "edits[0].patch.unit"),
    (
        "Condition.dictionary",
        MISSING,
        "edits",
        when(dictionary="other", feature=1),
        "edits[0].when.dictionary",
    ),
    (
        "Condition.dictionary",
        MISSING,
        "generation",
        {"stop_when": [{"dictionary": "other", "feature": 1}]},
        "stop_when[0].dictionary",
    ),
    (
        "Condition.dictionary",
        STATE,
        "edits",
        when(dictionary="elsewhere", feature=1),
        "edits[0].when.dictionary",
    ),
    ("Condition.feature", INVALID, "edits", when(dictionary=NAME), "edits[0].when.feature"),
    ("Condition.feature", RANGE, "edits", when(feature=32), "edits[0].when.feature"),
    (
        "Condition.feature",
        RANGE,
        "generation",
        {"stop_when": [{"dictionary": NAME, "feature": 32}]},
        "stop_when[0].feature",
    ),
    ("Condition.above", INVALID, "edits", when(above=math.inf), "edits[0].when.above"),
    (
        "Unit.UNIT_MAX_ACTIVATION_MULTIPLE",
        STATE,
        "edits",
        {"edits[0].feature": NEVER_FIRED, "edits[0].clamp.unit": 2},
        "edits[0].clamp.unit",
    ),
    ("Scope", INVALID, "edits", scope(positions=[-6]), "edits[0].scope.positions"),
    ("Scope.phases", INVALID, "edits", scope(phases=[0]), "edits[0].scope.phases[0]"),
    ("Scope.phases", INVALID, "edits", scope(phases=[1, 1]), "edits[0].scope.phases[1]"),
    ("Scope.positions", INVALID, "edits", scope(positions=[64]), "edits[0].scope.positions[0]"),
    ("Scope.positions", INVALID, "edits", scope(positions=[1] * 1025), "edits[0].scope.positions"),
    (
        "Scope.windows",
        INVALID,
        "edits",
        scope(windows=[{"first": 1, "end": 2}] * 65),
        "edits[0].scope.windows",
    ),
    ("Scope.token_ids", INVALID, "edits", scope(token_ids=[128]), "edits[0].scope.token_ids[0]"),
    ("Scope.token_ids", INVALID, "edits", scope(token_ids=[1] * 1025), "edits[0].scope.token_ids"),
    (
        "Scope.exclude_token_ids",
        INVALID,
        "edits",
        scope(exclude_token_ids=[128]),
        "edits[0].scope.exclude_token_ids[0]",
    ),
    (
        "Scope.exclude_token_ids",
        INVALID,
        "edits",
        scope(exclude_token_ids=[1] * 1025),
        "edits[0].scope.exclude_token_ids",
    ),
    (
        "Positions.positions",
        INVALID,
        "edits",
        scope(exclude_positions={"positions": [3, 64]}),
        "edits[0].scope.exclude_positions.positions[1]",
    ),
    (
        "Positions.positions",
        INVALID,
        "edits",
        scope(exclude_positions={"positions": [1] * 1025}),
        "edits[0].scope.exclude_positions.positions",
    ),
    (
        "Window.first",
        INVALID,
        "edits",
        scope(windows=[{"first": 64}]),
        "edits[0].scope.windows[0].first",
    ),
    (
        "Window.end",
        INVALID,
        "edits",
        scope(windows=[{"first": 1, "end": 65}]),
        "edits[0].scope.windows[0].end",
    ),
    *(
        (
            "SizeLimit.max_relative_size",
            INVALID,
            "edits",
            {"size_limit": {"max_relative_size": size}},
            "size_limit.max_relative_size",
        )
        for size in (0, 10_000, math.nan)
    ),
    (
        "SizeLimit.oversize",
        INVALID,
        "edits",
        {"size_limit": {"max_relative_size": 1, "oversize": 9}},
        "size_limit.oversize",
    ),
    (
        "Oversize.OVERSIZE_REJECT",
        INVALID,
        "generation",
        {
            "edits": [edit(add={"value": 3, "unit": 3})],
            "size_limit": {"max_relative_size": 1e-6, "oversize": 1},
        },
        None,
    ),
]

_READ_OUTS: list[_Row] = [
    ("ReadOut.selection", INVALID, "read_outs", {"read_outs[0].top_k": None}, "selection"),
    ("ReadOut.top_k", INVALID, "read_outs", {"read_outs[0].top_k": 0}, "top_k"),
    ("ReadOut.top_k", INVALID, "read_outs", {"read_outs[0].top_k": 129}, "top_k"),
    ("ReadOut.phases", INVALID, "read_outs", {"read_outs[0].phases": [0]}, "phases[0]"),
    ("ReadOut.phases", INVALID, "read_outs", {"read_outs[0].phases": [1, 1]}, "phases[1]"),
    ("ReadOut.stage", INVALID, "read_outs", {"read_outs[0].stage": 3}, "stage"),
    ("Above.threshold", INVALID, "read_outs", above(threshold=-1), "above.threshold"),
    ("Above.threshold", INVALID, "read_outs", above(threshold=math.nan), "above.threshold"),
    ("Above.row_bytes", INVALID, "read_outs", above(row_bytes=7), "above.row_bytes"),
    ("Above.row_bytes", INVALID, "read_outs", above(row_bytes=32_769), "above.row_bytes"),
    ("FeatureList.features", INVALID, "read_outs", named([]), "features.features"),
    ("FeatureList.features", INVALID, "read_outs", named([1] * 257), "features.features"),
    ("FeatureList.features", INVALID, "read_outs", named([1, 1]), "features.features"),
    ("FeatureList.features", RANGE, "read_outs", named([1, 32]), "features.features[1]"),
]
"""Their fields count from the read-out."""

_PROMPTS: list[_Row] = [
    ("Prompt.content", INVALID, "prompt", {"": {}}, ""),
    ("Prompt.content", INVALID, "prompt", {"text": ""}, "text"),
    ("Prompt.content", INVALID, "prompt", {"text": "x" * 64}, "text"),
    (
        "Prompt.token_ids",
        INVALID,
        "prompt",
        {"": {"token_ids": {"ids": [5, 128]}}},
        "token_ids.ids[1]",
    ),
    ("Chat.messages", INVALID, "prompt", chat(), "chat.messages"),
    ("Chat.messages", INVALID, "prompt", chat(*[2] * 1025), "chat.messages"),
    ("Chat.messages", INVALID, "prompt", chat(4, 2), "chat.messages"),
    ("ChatMessage.role", INVALID, "prompt", chat(2, 0), "chat.messages[1].role"),
    ("ChatMessage.role", INVALID, "prompt", chat(9), "chat.messages[0].role"),
]

_SAMPLING = [
    ("max_tokens", 0, ""),
    ("temperature", -0.5, ""),
    ("temperature", 2.5, ""),
    ("temperature", math.nan, ""),
    ("top_p", 0, ""),
    ("top_p", 1.5, ""),
    ("top_p", math.nan, ""),
    ("stop", ["a"] * 17, ""),
    ("stop", ["a", ""], "[1]"),
    ("top_k", 2**31, ""),
    ("seed", 2**63, ""),
    ("n", 0, ""),
    ("n", 17, ""),
]

_STOPS = [
    ([{"dictionary": NAME, "feature": 2}] * 9, ""),
    ([{"dictionary": NAME}], "[0].feature"),
    ([{"dictionary": NAME, "feature": 2, "above": -1}], "[0].above"),
]

_TOO_MANY = [edit(ablate={}, feature=i % 32) for i in range(65)]

_OTHERS: list[_Row] = [
    *(
        (f"{message}.edits", INVALID, rpc, {path: _TOO_MANY}, path)
        for message, rpc, path in (
            *(("Generation", rpc, f"{path}.edits") for rpc, path in _GENERATIONS),
            ("Arm", "Compare", "arms[0].edits"),
            ("ScoreRequest", "Score", "edits"),
            ("UpdateEdits", "Update", "update.edits"),
        )
    ),
    ("Generation.read_outs", INVALID, "generation", {"read_outs": [READ_OUT] * 9}, "read_outs"),
    (
        "ReadOuts.read_outs",
        INVALID,
        "Update",
        {"update.read_outs.read_outs": [READ_OUT] * 9},
        "update.read_outs.read_outs",
    ),
    *(
        (f"{message}.generation", INVALID, rpc, {path: None}, path)
        for message, rpc, path in (
            ("GenerateRequest", "Generate", "generation"),
            ("GenerateStreamRequest", "GenerateStream", "generation"),
            ("CompareRequest", "Compare", "generation"),
            ("StartTurn", "Session", "start_turn.generation"),
        )
    ),
    ("FeatureSet.features", INVALID, "Patch", {"sets[0].features": [1, 1]}, "sets[0].features"),
    (
        "ScoreRequest.continuations",
        INVALID,
        "Score",
        {"continuations[0].text": "a" * 59},
        "continuations[0].text",
    ),
    ("Generation.presets", INVALID, "edits", {"presets": ["gardens"] * 9}, "presets"),
    ("Generation.presets", INVALID, "edits", {"presets": ["gardens", "plants"]}, "presets[1]"),
    (
        "Generation.presets",
        INVALID,
        "edits",
        {"presets": ["gardens"], "edits": [edit(ablate={}, feature=4)]},
        "edits[0].feature",
    ),
    ("Generation.presets", MISSING, "edits", {"presets": ["none"]}, "presets[0]"),
    ("Sampling.n", INVALID, "Compare", {"generation.sampling.n": 2}, "generation.sampling.n"),
    (
        "Sampling.n",
        INVALID,
        "Session",
        {"start_turn.generation.sampling.n": 2},
        "start_turn.generation.sampling.n",
    ),
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
        for seconds in (0, 3601, math.nan)
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
    ("SessionRequest.command", INVALID, "Session", {"start_turn": None}, "command"),
    ("UpdateEdits.at_index", RANGE, "Update", {"update.at_index": 2}, "update.at_index"),
    ("CompareRequest.arms", INVALID, "Compare", {"arms": []}, "arms"),
    ("CompareRequest.arms", INVALID, "Compare", {"arms": [{}] * 9}, "arms"),
    ("ScoreRequest.continuations", INVALID, "Score", {"continuations": []}, "continuations"),
    (
        "ScoreRequest.continuations",
        INVALID,
        "Score",
        {"continuations": [{"text": "a"}] * 65},
        "continuations",
    ),
    ("Continuation.content", INVALID, "Score", {"continuations": [{}]}, "continuations[0]"),
    (
        "Continuation.content",
        INVALID,
        "Score",
        {"continuations[0].text": ""},
        "continuations[0].text",
    ),
    (
        "Continuation.token_ids",
        INVALID,
        "Score",
        {"continuations": [{"token_ids": {"ids": [128]}}]},
        "continuations[0].token_ids.ids[0]",
    ),
    (
        "PatchRequest.positions",
        INVALID,
        "Patch",
        {"source.text": "he", "positions": []},
        "positions",
    ),
    ("PatchRequest.sets", INVALID, "Patch", {"sets": []}, "sets"),
    ("PatchRequest.sets", INVALID, "Patch", {"sets": [{}] * 257}, "sets"),
    (
        "PatchRequest.sets",
        INVALID,
        "Patch",
        {"sets": [{"features": [1] * 1025}]},
        "sets[0].features",
    ),
    (
        "PatchRequest.sets",
        INVALID,
        "Patch",
        {"sets": [{}, {"features": range(32)}]},
        "sets[1].features",
    ),
    ("PatchRequest.sets", RANGE, "Patch", {"sets[0].features": [1, 32]}, "sets[0].features[1]"),
    (
        "PatchRequest.all_features",
        INVALID,
        "Patch",
        {"all_features": True, "sets": []},
        "all_features",
    ),
    ("PatchRequest.token_ids", INVALID, "Patch", {"token_ids": [1] * 257}, "token_ids"),
    ("PatchRequest.token_ids", INVALID, "Patch", {"token_ids": [128]}, "token_ids[0]"),
    ("PatchRequest.top_k", INVALID, "Patch", {"top_k": 0}, "top_k"),
    ("PatchRequest.top_k", INVALID, "Patch", {"top_k": 129}, "top_k"),
    ("PositionPair.source", RANGE, "Patch", {"positions[0].source": 5}, "positions[0].source"),
    ("PositionPair.source", RANGE, "Patch", {"positions[0].source": -6}, "positions[0].source"),
    ("PositionPair.target", RANGE, "Patch", {"positions[0].target": 5}, "positions[0].target"),
    (
        "PositionPair.target",
        INVALID,
        "Patch",
        {"positions": [{"source": 1, "target": 4}, {"source": 2, "target": -1}]},
        "positions[1].target",
    ),
]


async def too_many_calls(_: Serving) -> CallFailed:
    async with serving(max_calls=1) as own, held(own):
        return await refused(own, "GenerateStream", {})


async def no_template(_: Serving) -> CallFailed:
    async with serving() as own:
        own.engine.tokenizer.chats = False
        return await refused(own, "Generate", {"generation.prompt": {"chat": {}}})


async def no_memory(service: Serving) -> CallFailed:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "available_bytes", lambda: 10)
        return await refused(service, "LoadDictionary", {})


async def no_root(_: Serving) -> CallFailed:
    async with serving() as own:
        return await refused(own, "LoadDictionary", {})


async def unload_in_use(service: Serving) -> CallFailed:
    async with held(service):
        return await refused(service, "UnloadDictionary", {"name": NAME})


async def second_turn(service: Serving) -> CallFailed:
    async with held(service) as session:
        await session.write(steering_pb2.SessionRequest(**GOOD["Session"]))
        return await failure(session)


async def update_without_turn(service: Serving) -> CallFailed:
    session = service.steering.Session()
    await session.write(steering_pb2.SessionRequest(**GOOD["Update"]))
    response = await session.read()
    await session.done_writing()
    return rejection(response.update_rejected)


async def page_of_another_search(service: Serving) -> CallFailed:
    query = {"query": "n", "page_size": 1}
    request = dictionaries_pb2.SearchFeaturesRequest(**query)
    first = await service.dictionaries.SearchFeatures(request)
    assert first.next_page_token
    change = {"query": "a", "page_token": first.next_page_token}
    return await refused(service, "SearchFeatures", change)


async def failure(call) -> CallFailed:
    """How a call that may have answered ends."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return CallFailed.from_rpc(error)
    raise AssertionError("it ended well")


_SCENES: list[tuple[str, str, str, str, Ask]] = [
    ("SteeringService.GenerateStream", FULL, "GenerateStream", "", too_many_calls),
    ("Prompt.chat", STATE, "Generate", "generation.prompt.chat", no_template),
    ("AdminService.LoadDictionary", FULL, "LoadDictionary", "folder", no_memory),
    ("AdminService.LoadDictionary", STATE, "LoadDictionary", "", no_root),
    ("AdminService.UnloadDictionary", STATE, "UnloadDictionary", "name", unload_in_use),
    (
        "SearchFeaturesRequest.page_token",
        INVALID,
        "SearchFeatures",
        "page_token",
        page_of_another_search,
    ),
    ("SessionRequest.start_turn", STATE, "Session", "start_turn", second_turn),
    ("UpdateRejected", STATE, "Update", "update", update_without_turn),
]
"""What takes more than one request."""

ENGINE_ONLY: dict[Bound, str] = {
    ("Edit", INVALID): "only the model's own x shows how far edits move it",
    ("UpdateEdits", FULL): "the engine counts the updates that took effect",
}
"""What the fake engine cannot be brought to, and why."""


def _shared() -> Iterator[_Row]:
    for name, where, field in _UNKNOWN:
        yield name, MISSING, where, {field: "other"}, field
    yield from _EDITS
    for name, code, where, change, field in _READ_OUTS:
        yield name, code, where, change, f"read_outs[0].{field}"
    yield from _PROMPTS
    for name, value, place in _SAMPLING:
        path = f"sampling.{name}"
        yield f"Sampling.{name}", INVALID, "generation", {path: value}, f"{path}{place}"
    for conditions, place in _STOPS:
        change = {"stop_when": conditions}
        yield "Generation.stop_when", INVALID, "generation", change, f"stop_when{place}"
    yield from _OTHERS


AT_BOUNDS: list[tuple[str, Change]] = [
    ("Generate", {"generation.size_limit": {"max_relative_size": 9_999}}),
    ("Generate", {"generation.sampling": {"max_tokens": 1, "temperature": 2, "top_p": 1}}),
    ("Generate", {"generation.sampling": {"max_tokens": 1, "n": 16, "stop": ["~~"] * 16}}),
    ("Generate", {"generation.edits": [], "generation.presets": ["gardens"]}),
    ("Generate", {"generation.stop_when": [{"dictionary": NAME, "feature": 2, "above": 0}] * 8}),
    ("Generate", {"generation.edits": [edit(ablate={}, feature=i) for i in range(32)]}),
    ("Generate", {"generation.read_outs": [READ_OUT] * 8}),
    ("Generate", {"generation.read_outs[0].top_k": 128}),
    *(
        ("Generate", {f"generation.{path}": value})
        for fields in (
            above(threshold=0, row_bytes=8),
            above(row_bytes=32_768),
            scope(positions=[1] * 1024, token_ids=[127, *[ord("e")] * 1023]),
            scope(windows=[{"first": 1, "end": 64}] * 64),
            scope(positions=[-4], exclude_positions={"positions": [63, -5]}),
            patch([-5, -1], [1, 2]),
        )
        for path, value in fields.items()
    ),
    ("Generate", {"generation.prompt": {"text": "x" * 63}}),
    ("Inspect", {"prompts": [{"text": "a"}] * 63 + [{"text": "ab"}], "top_k": 1024}),
    ("BatchGetFeatures", {"features": list(range(32))}),
    ("SearchFeatures", {"query": "ä" * 128, "page_size": 100}),
    ("NearestFeatures", {"feature": 31, "top_k": 128}),
    ("SetWatchList", {"features": [{"dictionary": NAME, "feature": i} for i in range(32)]}),
    ("SetWatchList", {"features": [{"dictionary": NAME, "feature": 3}]}),
    ("Compare", {"arms": [{}] * 8}),
    ("Score", {"continuations": [{"text": "a"}] * 64}),
    ("Score", {"continuations": [{"text": "a" * 58}]}),
    ("Patch", {"sets": [{}] * 256, "token_ids": [127] * 256, "top_k": 128}),
    ("Patch", {"positions": [{"source": -5, "target": 4}], "top_k": 1}),
]
"""The last values that the comments allow."""


CASES = [
    *(case for row in _shared() for case in _past(*row)),
    *(Case((name, code), rpc, field, ask) for name, code, rpc, field, ask in _SCENES),
]
