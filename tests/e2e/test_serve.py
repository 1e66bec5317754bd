"""Plain `vllm serve` with steer installed beside it: without dictionaries, with them, and switched off."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, EngineArgs, LLMEngine, SamplingParams
from vllm.inputs import TokensPrompt

from steer_server.dictionary.edits import Ablate, AddRelative
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import EditTooLarge
from tests.e2e.helpers import IOI
from tests.e2e.reference import Reference
from tests.e2e.serve import Server, serving
from tests.e2e.test_engine import from_one

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EDITS = (AddRelative(9, 0.5), Ablate(7))
AS_JSON = [
    {"dictionary": "random", "feature": 9, "add": {"value": 0.5, "unit": "relative_norm"}},
    {"dictionary": "random", "feature": 7, "ablate": {}},
]
HUGE = [{"dictionary": "random", "feature": 9, "add": {"value": 1e30, "unit": "relative_norm"}}]


def xargs(edits: list[Any] = AS_JSON, read_outs: list[Any] | None = None) -> dict[str, str]:
    return {"steer": json.dumps({"edits": edits, "read_outs": read_outs or []})}


@pytest.fixture(scope="module")
def bare(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without dictionaries."""
    with serving(model_path, tmp_path_factory.mktemp("serve") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def steered(
    model_path: Path, random_dictionary: StoredDictionary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serving(
        model_path,
        tmp_path_factory.mktemp("serve") / "log",
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
        env={"STEER_DICTIONARIES": f"random={random_dictionary.folder}"},
    ) as server:
        yield server


@pytest.fixture
def configured(random_dictionary: StoredDictionary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of this process have the dictionary."""
    monkeypatch.setenv("STEER_DICTIONARIES", f"random={random_dictionary.folder}")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def test_without_dictionaries_a_completion_works_and_one_with_edits_is_refused_by_name(
    bare: Server,
) -> None:
    status, answer = bare.complete(IOI)
    refused, error = bare.complete(IOI, vllm_xargs=xargs())

    assert status == 200
    assert answer["choices"][0]["text"].startswith(" Mary")
    assert answer["kv_transfer_params"] is None
    assert refused == 400
    assert error["error"]["param"] == "steer"
    assert "STEER_DICTIONARIES" in error["error"]["message"]
    assert bare.complete(IOI, vllm_xargs={"other": "1"})[0] == 200


def test_edits_over_http_equal_a_transformers_hook_and_plain_requests_beside_them_none(
    steered: Server, reference: Reference
) -> None:
    prompt = reference.tokenize(IOI)
    fields = {"return_token_ids": True, "ignore_eos": True, "max_tokens": 16, "logprobs": 0}

    def ask(own: dict[str, Any]) -> dict[str, Any]:
        status, answer = steered.complete(prompt, **fields, **own)
        assert status == 200, answer
        return answer["choices"][0]

    with ThreadPoolExecutor(4) as pool:
        choices = list(pool.map(ask, [{}, {"vllm_xargs": xargs()}] * 2))

    for choice, edits in zip(choices, [(), EDITS] * 2, strict=True):
        expected = reference.generate(prompt, 16, from_one(edits))
        assert tuple(choice["token_ids"]) == expected.token_ids
        got = choice["logprobs"]["token_logprobs"]
        assert np.abs(np.subtract(got, expected.logprobs)).max() < 1e-4


def test_the_full_answer_proves_each_edit_and_has_what_was_read(
    steered: Server, reference: Reference, random_dictionary: StoredDictionary
) -> None:
    prompt = reference.tokenize(IOI)

    status, answer = steered.complete(
        prompt,
        max_tokens=16,
        ignore_eos=True,
        vllm_xargs=xargs(read_outs=[{"dictionary": "random", "features": [9]}]),
    )

    assert status == 200
    report = answer["kv_transfer_params"]["steer"]["0"]
    assert [edit["tokens_in_scope"] for edit in report["edits"]] == [len(prompt) + 14] * 2
    assert report["edits"][0]["mean_relative_size"] == pytest.approx(0.5)
    x = reference.generate(prompt, 16, from_one(EDITS)).x
    f = random_dictionary.dictionary.encode(x)[:, 9].tolist()
    assert values_by_position(report["activations"]) == pytest.approx(f, abs=1e-3)


def values_by_position(activations: list[dict[str, Any]]) -> list[float]:
    """Of a read-out of one feature."""
    found = {}
    for block in activations:
        splits = block["row_splits"]
        for i, position in enumerate(block["positions"]):
            listed = block["values"][splits[i] : splits[i + 1]]
            found[position] = listed[0] if listed else 0.0
    return [found[position] for position in range(len(found))]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"edits": [', "steer"),
        ('{"edits": {}}', "steer.edits"),
        ('{"edit": []}', "steer"),
        (json.dumps({"edits": [AS_JSON[0] | {"dictionary": "no"}]}), "steer.edits[0].dictionary"),
        (json.dumps({"edits": [AS_JSON[1] | {"feature": 9999}]}), "steer.edits[0].feature"),
        (json.dumps({"edits": [AS_JSON[1] | {"clamp": {}}]}), "steer.edits[0]"),
        (json.dumps({"read_outs": [{"dictionary": "random"}]}), "steer.read_outs[0]"),
    ],
)
def test_what_is_wrong_is_400_with_its_path_and_nothing_else_breaks(
    steered: Server, text: str, field: str
) -> None:
    status, answer = steered.complete(IOI, vllm_xargs={"steer": text})

    assert status == 400
    assert answer["error"]["param"] == field
    assert answer["error"]["message"].startswith(field)
    assert steered.complete(IOI)[1]["choices"][0]["text"].startswith(" Mary")


def test_an_edit_too_large_fails_its_own_request_streamed_or_not(steered: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(steered.complete, IOI, max_tokens=32)
        status, answer = steered.complete(IOI, vllm_xargs=xargs(HUGE))
    last = steered.stream(IOI, vllm_xargs=xargs(HUGE))[-1]

    assert status == 400
    assert "smaller strengths" in answer["error"]["message"]
    assert "smaller strengths" in last["error"]["message"]
    assert beside.result()[0] == 200
    assert beside.result()[1]["choices"][0]["text"].startswith(" Mary")


def test_a_stream_is_edited_like_a_full_answer(steered: Server) -> None:
    fields = {"max_tokens": 16, "ignore_eos": True, "vllm_xargs": xargs()}
    _, whole = steered.complete(IOI, **fields)

    chunks = steered.stream(IOI, **fields)

    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert not whole["choices"][0]["text"].startswith(" Mary")


def test_equal_programs_share_the_prefix_cache_and_others_do_not(steered: Server) -> None:
    prompt = " ".join(f"number {n};" for n in range(40))
    cached = []
    for fields in ({}, {"vllm_xargs": xargs()}) * 2:
        _, answer = steered.complete(prompt, **fields)
        details = answer["usage"]["prompt_tokens_details"]
        cached.append(details["cached_tokens"] if details else 0)

    assert cached == [0, 0, 128, 128]


def test_each_of_several_sequences_is_reported_whenever_it_ends(steered: Server) -> None:
    status, answer = steered.complete(
        IOI, n=4, temperature=1.5, seed=3, max_tokens=24, stop=["e"], vllm_xargs=xargs()
    )

    assert status == 200
    reports = answer["kv_transfer_params"]["steer"]
    assert sorted(reports) == ["0", "1", "2", "3"]
    assert len({report["edits"][0]["tokens_in_scope"] for report in reports.values()}) > 1


def test_several_sequences_without_a_seed_are_edited_too(steered: Server) -> None:
    status, answer = steered.complete(IOI, n=2, temperature=0.01, vllm_xargs=xargs())

    assert status == 200, answer
    assert sorted(answer["kv_transfer_params"]["steer"]) == ["0", "1"]


def test_a_request_that_is_aborted_by_its_name_proves_what_came_before(steered: Server) -> None:
    before = generated_tokens(steered)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            steered.complete,
            IOI,
            request_id="long",
            max_tokens=480,
            ignore_eos=True,
            return_token_ids=True,
            vllm_xargs=xargs(),
        )
        while generated_tokens(steered) < before + 4:
            assert not running.done(), running.result()
            time.sleep(0.05)
        steered.post("/inference/v1/abort_requests", {"request_ids": ["cmpl-long-0"]})
        status, answer = running.result()

    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "abort"
    rows = len(choice["prompt_token_ids"]) + len(choice["token_ids"]) - 1
    # The last token is never read by the model, and position 0 is not in the default scope.
    for edit in answer["kv_transfer_params"]["steer"]["0"]["edits"]:
        assert edit["tokens_in_scope"] == rows - 1


def generated_tokens(server: Server) -> float:
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:generation_tokens_total"))
    return float(line.split()[-1])


def test_beam_search_with_edits_is_refused(steered: Server) -> None:
    status, answer = steered.complete(IOI, use_beam_search=True, n=2, vllm_xargs=xargs())

    assert status == 400
    assert "beam search" in answer["error"]["message"]
    assert steered.complete(IOI, use_beam_search=True, n=2)[0] == 200


def test_an_endpoint_that_would_drop_edits_refuses_them(steered: Server) -> None:
    asked = {"query": IOI, "items": [" Mary", " John"], "label_token_ids": [9, 10]}

    refused, error = steered.post("/generative_scoring", asked | {"vllm_xargs": xargs()})

    assert refused == 400
    assert error["error"]["param"] == "steer"
    assert "/v1/completions" in error["error"]["message"]
    assert steered.post("/generative_scoring", asked | {"vllm_xargs": {"other": 1}})[0] == 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("configured")
@pytest.mark.nightly
def test_vllms_own_python_classes_take_programs_too_whatever_was_configured_before(
    model_path: Path, reference: Reference
) -> None:
    prompt = reference.tokenize(IOI)
    parameters = SamplingParams(
        max_tokens=16, temperature=0.0, ignore_eos=True, extra_args={"steer": {"edits": AS_JSON}}
    )

    arguments = EngineArgs(str(model_path), dtype="float32", enforce_eager=True, max_model_len=256)
    arguments.create_engine_config()
    engine = LLMEngine.from_engine_args(arguments)
    try:
        engine.add_request("one", TokensPrompt(prompt_token_ids=prompt), parameters)
        while engine.has_unfinished_requests():
            outputs = engine.step()
    finally:
        engine.engine_core.shutdown()

    (output,) = outputs
    expected = reference.generate(prompt, 16, from_one(EDITS))
    assert tuple(output.outputs[0].token_ids) == expected.token_ids
    edits = output.kv_transfer_params["steer"]["0"]["edits"]
    assert [edit["tokens_in_scope"] for edit in edits] == [len(prompt) + 14] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("configured")
@pytest.mark.nightly
def test_a_call_of_vllms_llm_that_fails_leaves_nothing_for_the_next_one(
    model_path: Path, reference: Reference
) -> None:
    prompt = TokensPrompt(prompt_token_ids=reference.tokenize(IOI))
    plain = SamplingParams(max_tokens=1, temperature=0.0)
    failing, edited = (
        SamplingParams(
            max_tokens=16, temperature=0.0, ignore_eos=True, extra_args={"steer": {"edits": edits}}
        )
        for edits in (HUGE, AS_JSON)
    )

    llm = LLM(str(model_path), dtype="float32", enforce_eager=True, max_model_len=256)
    try:
        with pytest.raises(EditTooLarge):
            llm.generate([prompt] * 3, [plain, failing, edited], use_tqdm=False)
        outputs = llm.generate(prompt, edited, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()

    (output,) = outputs
    expected = reference.generate(prompt["prompt_token_ids"], 16, from_one(EDITS))
    assert tuple(output.outputs[0].token_ids) == expected.token_ids
    assert len(output.kv_transfer_params["steer"]["0"]["edits"]) == 2


def test_steer_disable_leaves_vllm_alone() -> None:
    code = """
import os
from vllm.engine.arg_utils import EngineArgs
from steer_server.vllm_plugin.plugin import register
before = EngineArgs.create_engine_config
os.environ["STEER_DISABLE"] = "1"
register()
assert EngineArgs.create_engine_config is before
del os.environ["STEER_DISABLE"]
register()
assert EngineArgs.create_engine_config is not before
"""

    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert finished.returncode == 0, finished.stderr
