"""Tensor- and pipeline-parallel engines of two worker processes against the reference on one."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from steer_server.dictionary.edits import Ablate, AddRelative, Clamp, Edit
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.generation import Generation, Sampling
from steer_server.program import FeatureEdit, Program, ReadOut
from tests.dictionaries import make_dictionary
from tests.e2e.engines import started
from tests.e2e.helpers import TEXTS, run
from tests.e2e.models import LAYERS, make_tiny_llama
from tests.e2e.reference import Reference
from tests.e2e.test_engine import assert_same, from_one

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FIRST, LAST = Site("resid_post", 1), Site("resid_post", LAYERS - 1)
"""With two stages, the end of the first one and a site of the last."""
EDITS: dict[str, Sequence[Edit]] = {
    "first": (AddRelative(9, 0.5), Ablate(3)),
    "last": (Clamp(7, 5.0), AddRelative(5, 0.3)),
}


@pytest.fixture(scope="module")
def tiny(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", model_path)


@pytest.fixture(scope="module")
def dictionaries(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, StoredDictionary]:
    folder = tmp_path_factory.mktemp("dictionaries")
    return {
        name: make_dictionary(tiny, site, folder / name)
        for name, site in (("first", FIRST), ("last", LAST))
    }


PARALLEL = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}


@pytest.fixture(scope="module", params=PARALLEL)
async def engine(
    request: pytest.FixtureRequest, tiny: Path, dictionaries: dict[str, StoredDictionary]
):
    settings = EngineSettings(
        str(tiny),
        (FIRST, LAST),
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
    )
    async with started(settings, dictionaries, **PARALLEL[request.param]) as engine:
        yield engine


@pytest.mark.parametrize("name", EDITS)
async def test_edits_at_either_stage_equal_a_transformers_hook(
    engine: VllmEngine, tiny: Path, dictionaries: dict[str, StoredDictionary], name: str
) -> None:
    stored = dictionaries[name]
    reference = Reference(tiny, stored.card.site.layer, stored.dictionary)
    prompts = [reference.tokenize(text) for text in (*TEXTS, " ".join(map(str, range(50))))]
    program = Program(
        tuple(FeatureEdit(name, edit) for edit in EDITS[name]), (ReadOut(name, top_k=4),)
    )

    outcomes = await asyncio.gather(
        *(run(engine, f"{name}{i}", prompt, program) for i, prompt in enumerate(prompts))
    )

    for prompt, outcome in zip(prompts, outcomes, strict=True):
        expected = reference.generate(prompt, 16, from_one(EDITS[name]))
        assert_same(outcome, expected)
        assert_reads_like(outcome.features(), stored, expected.x)
        assert outcome.finish is not None
        in_scope = [report.tokens_in_scope for report in outcome.finish.reports]
        assert in_scope == [len(prompt) + 14] * len(EDITS[name])


def assert_reads_like(features, stored: StoredDictionary, x) -> None:
    """Every row was reported, with the reference's strongest features."""
    f = stored.dictionary.encode(x)
    assert sorted(features) == list(range(len(f)))
    for position, row in features.items():
        for feature, value in row.items():
            assert value == pytest.approx(float(f[position, feature]), abs=2e-3)


async def test_a_program_over_both_stages_is_proved_and_read_at_both(
    engine: VllmEngine, tiny: Path, dictionaries: dict[str, StoredDictionary]
) -> None:
    reference = Reference(tiny, FIRST.layer, dictionaries["first"].dictionary)
    prompt = reference.tokenize(" ".join(map(str, range(50))))
    edits = tuple(FeatureEdit(name, edit) for name in EDITS for edit in EDITS[name])
    read_outs = tuple(ReadOut(name, top_k=1) for name in EDITS)

    outcome = await run(engine, "both", prompt, Program(edits, read_outs))

    assert outcome.finish is not None
    rows = len(prompt) + 14
    assert [report.tokens_in_scope for report in outcome.finish.reports] == [rows] * 4
    for number in range(2):
        read = [p for r in outcome.rows if r.read_out == number for p in r.positions.tolist()]
        assert sorted(read) == list(range(rows + 1))


async def test_an_update_takes_hold_at_the_same_token_on_every_rank(
    engine: VllmEngine, tiny: Path, dictionaries: dict[str, StoredDictionary]
) -> None:
    """Edits at both stages change in one update; a rank that switched elsewhere would show in the tokens."""
    edits = {"first": EDITS["first"][:1], "last": EDITS["last"][1:]}
    program = Program(tuple(FeatureEdit(name, edit) for name in edits for edit in edits[name]))
    reference = Reference(tiny, FIRST.layer, dictionaries["first"].dictionary)
    prompt = tuple(reference.tokenize(TEXTS[0]))
    sampling = Sampling(max_tokens=32, temperature=0.0, ignore_eos=True)
    ids, applied = [], []

    async for step in engine.generate(Generation("live", prompt, sampling, live=True)):
        ids += step.token_ids
        applied += step.applied
        if step.first_index == 5:
            await engine.update("live", program)

    (revision,) = applied
    boundary = len(prompt) + revision.first_index - 1
    with reference.also(
        LAST.layer, dictionaries["last"].dictionary, after(boundary, edits["last"])
    ):
        expected = reference.generate(prompt, 32, after(boundary, edits["first"]))
    assert tuple(ids) == expected.token_ids
    one_stage = reference.generate(prompt, 32, after(boundary, edits["first"]))
    assert tuple(ids) != one_stage.token_ids


def after(boundary: int, edits: Sequence[Edit]):
    return lambda position: edits if position >= boundary else ()
