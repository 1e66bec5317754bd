"""Every family, every stream: an edit in vLLM is the same edit in a transformers hook, and x is transformers' x.

One process loads the small models one after the other, without the rest of steer.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt

from tests.e2e.engines import MODES
from tests.e2e.families import (
    D_MODEL,
    FAMILIES,
    SITES,
    Completion,
    FamilyWorker,
    Reference,
)

pytestmark = pytest.mark.e2e

NIGHTLY = {"phi3", "olmo2", "granite", "stablelm", "olmoe", "qwen2_moe", "qwen3_moe"}
"""Built like one of the others as far as sites go; five seconds each."""
PROMPT = [5, 17, 300, 42, 7, 99, 256, 3]
TOKENS = 6
D = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def vllm_in_this_process() -> Iterator[None]:
    """On one core, which is quickest for models this small; other tests find the process as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # Not what vLLM would choose, which depends on whether Triton finds a device.
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int("v2" in MODES)))
        # vLLM looks at every class in a process of its own, for CUDA's sake; ten seconds each.
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda look: look())
        yield
    cleanup_dist_env_and_memory()
    torch.set_num_threads(threads)


class Known(NamedTuple):
    folder: Path
    by_site: list[Completion]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Known]:
    """What transformers gives; all before vLLM starts, which rebuilds the classes of transformers that it uses."""
    references = {}
    for name, family in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        family.save(folder)
        reference = Reference(folder, family)
        by_site = [reference.generate(PROMPT, TOKENS, site, D) for site in SITES]
        references[name] = Known(folder, by_site)
    return references


def start(folder: Path, eager: bool = True) -> LLM:
    return LLM(
        str(folder),
        worker_cls="tests.e2e.families.FamilyWorker",
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=eager,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=2**24,
        enable_prefix_caching=False,
    )


def generate(llm: LLM, number: int) -> Completion:
    parameters = SamplingParams(
        max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False
    )
    with FamilyWorker.tap.at(number, D):
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=PROMPT), parameters, use_tqdm=False)
    ids = list(output.outputs[0].token_ids)
    logprobs = output.outputs[0].logprobs or []
    chosen = [entry[token].logprob for entry, token in zip(logprobs, ids, strict=True)]
    return Completion(ids, chosen, torch.cat(FamilyWorker.tap.x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name in FAMILIES],
)
def test_an_edit_of_every_stream_equals_a_transformers_hook(
    name: str, known: dict[str, Known]
) -> None:
    check(known[name], eager=True)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "cohere", "mixtral"])
def test_it_does_in_compiled_models_of_each_kind_of_output(
    name: str, known: dict[str, Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    check(known[name], eager=False)


def check(known: Known, eager: bool) -> None:
    llm = start(known.folder, eager)
    assert llm.llm_engine.vllm_config.use_v2_model_runner == ("v2" in MODES)
    try:
        for number, (site, want) in enumerate(zip(SITES, known.by_site, strict=True)):
            got = generate(llm, number)

            assert got.token_ids == want.token_ids, site
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4), site
            torch.testing.assert_close(got.x, want.x, atol=1e-3, rtol=0, msg=str(site))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
