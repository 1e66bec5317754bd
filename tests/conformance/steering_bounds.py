"""Past the bounds of prompts, read-outs and sampling, and of what SteeringService takes beside."""

import math
from collections.abc import Iterator

from tests.conformance.cases import (
    GENERATIONS,
    INVALID,
    MISSING,
    RANGE,
    Row,
    above,
    chat,
    edit,
    named,
)
from tests.conformance.requests import READ_OUT
from tests.unit.serving import NAME

_READ_OUTS: list[Row] = [
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

_PROMPTS: list[Row] = [
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
    ([{"feature": 2}], "[0].dictionary"),
    ([{"dictionary": NAME}], "[0].feature"),
    ([{"dictionary": NAME, "feature": 2, "above": -1}], "[0].above"),
]

_TOO_LONG = [READ_OUT, {"dictionary": NAME, "above": {"row_bytes": 32_768}}]
_TOO_MANY = [edit(ablate={}, feature=i % 32) for i in range(65)]

_OTHERS: list[Row] = [
    *(
        (f"{message}.edits", INVALID, rpc, {path: _TOO_MANY}, path)
        for message, rpc, path in (
            *(("Generation", rpc, f"{path}.edits") for rpc, path in GENERATIONS),
            ("Arm", "Compare", "arms[0].edits"),
            ("ScoreRequest", "Score", "edits"),
            ("UpdateEdits", "Update", "update.edits"),
        )
    ),
    # More features than the engine has slots.
    *(
        ("Generation.edits", INVALID, rpc, {f"{path}.edits": _TOO_MANY[:17]}, f"{path}.edits")
        for rpc, path in GENERATIONS
    ),
    (
        "Generation.read_outs",
        INVALID,
        "generation",
        {"read_outs": _TOO_LONG},
        "read_outs",
    ),
    # Its text is read once more, with room for a token.
    (
        "Prompt.content",
        INVALID,
        "Compare",
        {"generation.prompt.text": "h" * 63},
        "generation.prompt",
    ),
    ("Generation.read_outs", INVALID, "generation", {"read_outs": [READ_OUT] * 9}, "read_outs"),
    (
        "Sampling.seed",
        INVALID,
        "Generate",
        {"generation.sampling": {"seed": 2**63 - 1, "n": 2}},
        "generation.sampling.seed",
    ),
    *(
        (
            "ReadOuts.read_outs",
            INVALID,
            "Update",
            {"update.read_outs.read_outs": too_many},
            "update.read_outs.read_outs",
        )
        for too_many in ([READ_OUT] * 9, _TOO_LONG)
    ),
    ("EncodeRequest.read_outs", INVALID, "Encode", {"read_outs": _TOO_LONG}, "read_outs"),
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


def steering() -> Iterator[Row]:
    """All of them."""
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
