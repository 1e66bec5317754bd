"""Named sets of edits: the operator's file, and requests that use them."""

from dataclasses import replace
from pathlib import Path

import pytest

from steer_client import CallFailed, SteerClient, ablate, clamp
from steer_server.__main__ import check_presets
from steer_server.api.presets import Presets
from steer_server.errors import InvalidConfig
from tests.unit.serving import NAME, serving

FILE = f"""
[calm]
description = "Nothing to be afraid of."
edits = [
    {{dictionary = "{NAME}", feature = 2, clamp = {{value = 2, unit = "UNIT_MAX_ACTIVATION_MULTIPLE"}}}},
    {{dictionary = "{NAME}", feature = 5, ablate = {{}}}},
]

[late]
edits = [{{dictionary = "{NAME}", feature = 7, ablate = {{}}, scope = {{positions = [-9]}}}}]
"""


def loaded(tmp_path: Path, text: str) -> Presets:
    file = tmp_path / "presets.toml"
    file.write_text(text)
    return Presets.load(file)


@pytest.fixture
async def client(tmp_path: Path):
    presets = loaded(tmp_path, FILE)
    async with serving(presets=presets) as service, SteerClient(service.target) as client:
        yield client


async def test_a_presets_edits_come_before_the_requests_own(client: SteerClient):
    answer = await client.complete(
        "hello", presets=["calm"], edits=[clamp((NAME, 3), 1)], max_tokens=2
    )

    edits = answer.started.edits
    assert [edit.feature for edit in edits] == [2, 5, 3]
    assert edits[0].clamp.value == 6, "feature 2 fired at most at 3"
    reports = answer.sequences[0].finished.edit_reports
    assert [report.edit for report in reports] == [0, 1, 2]


async def test_the_server_lists_its_presets(client: SteerClient):
    presets = (await client.info()).presets

    assert [preset.name for preset in presets] == ["calm", "late"]
    assert presets[0].description == "Nothing to be afraid of."
    assert presets[0].edits[1].WhichOneof("kind") == "ablate"


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"presets": ["none"]}, "NOT_FOUND", "generation.presets[0]"),
        ({"presets": ["calm"] * 9}, "INVALID_ARGUMENT", "generation.presets"),
        ({"presets": ["calm", "calm"]}, "INVALID_ARGUMENT", "generation.presets[1]"),
        (
            {"presets": ["calm"], "edits": [ablate((NAME, 3)), ablate((NAME, 5))]},
            "INVALID_ARGUMENT",
            "generation.edits[1].feature",
        ),
        ({"presets": ["calm", "late"]}, "INVALID_ARGUMENT", "generation.presets[1]"),
    ],
)
async def test_what_cannot_be_used_is_refused_by_its_place(client, options, code: str, field: str):
    with pytest.raises(CallFailed) as caught:
        await client.complete("hello", max_tokens=1, **options)

    assert (caught.value.code.name, caught.value.field) == (code, field)


async def test_a_conflict_names_the_preset_it_is_with(client: SteerClient):
    with pytest.raises(CallFailed, match=r"already edited by presets\[0\]"):
        await client.complete("hello", presets=["calm"], edits=[ablate((NAME, 5))], max_tokens=1)


@pytest.mark.parametrize(
    ("text", "field", "why"),
    [
        ("[x", "presets", "cannot be read"),
        ("['A b']\nedits = [{}]", "presets", "cannot name a preset"),
        ("[x]\nedit = []", "presets.x", "not a table of edits"),
        ("[x]\nedits = []", "presets.x", "1 to 64"),
        ("[x]\nedits = [{feature = 2, ablated = {}}]", r"presets.x.edits\[0\]", "ablated"),
        ("[x]\nedits = [{clamp = {unit = 'UNIT_PARSEC'}}]", r"presets.x.edits\[0\]", "UNIT_PARSEC"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, field: str, why: str):
    with pytest.raises(InvalidConfig, match=why) as caught:
        loaded(tmp_path, text)

    assert caught.value.field == field.replace("\\", "")


async def test_a_preset_that_never_finds_its_slots_is_refused_at_start(tmp_path: Path):
    edits = [f'{{dictionary = "{NAME}", feature = {n}, ablate = {{}}}}' for n in range(17)]
    async with serving() as service:
        served = service.generations.served
        served = replace(served, presets=loaded(tmp_path, f"[all]\nedits = [{', '.join(edits)}]"))

        with pytest.raises(InvalidConfig, match="17 slots") as caught:
            check_presets(served)

    assert caught.value.field == "presets.all"
