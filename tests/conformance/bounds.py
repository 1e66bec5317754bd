"""For each bound in the protos' comments: requests past it, and the field that the refusal has to name."""

from collections.abc import Iterator

from tests.conformance.cases import (
    FULL,
    INVALID,
    MISSING,
    STATE,
    Ask,
    Case,
    Change,
    Row,
    above,
    edit,
    past,
    patch,
    scope,
)
from tests.conformance.contract import Bound
from tests.conformance.edit_bounds import EDITS
from tests.conformance.lookup_bounds import LOOKUPS
from tests.conformance.requests import READ_OUT
from tests.conformance.scenes import (
    no_memory,
    no_root,
    no_template,
    one_update_too_many,
    page_of_another_search,
    second_turn,
    too_many_calls,
    unload_in_use,
    update_without_turn,
)
from tests.conformance.steering_bounds import steering
from tests.unit.serving import NAME

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
    ("UpdateEdits", FULL, "Update", "", one_update_too_many),
]
"""What takes more than one request."""

ENGINE_ONLY: dict[Bound, str] = {
    ("Edit", INVALID): "only the model's own x shows how far edits move it",
}
"""What the fake engine cannot be brought to, and why."""


def _rows() -> Iterator[Row]:
    for name, where, field in _UNKNOWN:
        yield name, MISSING, where, {field: "other"}, field
    yield from EDITS
    yield from steering()
    yield from LOOKUPS


AT_BOUNDS: list[tuple[str, Change]] = [
    ("Generate", {"generation.size_limit": {"max_relative_size": 9_999}}),
    ("Generate", {"generation.sampling": {"max_tokens": 1, "temperature": 2, "top_p": 1}}),
    ("Generate", {"generation.sampling": {"max_tokens": 1, "n": 16, "stop": ["~~"] * 16}}),
    ("Generate", {"generation.edits": [], "generation.presets": ["gardens"]}),
    ("Generate", {"generation.stop_when": [{"dictionary": NAME, "feature": 2, "above": 0}] * 8}),
    ("Generate", {"generation.edits": [edit(ablate={}, feature=i) for i in range(16)]}),
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
    *(case for row in _rows() for case in past(*row)),
    *(Case((name, code), rpc, field, ask) for name, code, rpc, field, ask in _SCENES),
]
