"""What is refused when an engine starts: settings of vLLM, and dictionaries that it cannot serve."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm import EngineArgs
from vllm.config import CacheConfig, ParallelConfig

from steer_server.dictionary.files import save
from steer_server.dictionary.site import Site
from steer_server.errors import DictionaryMismatch, UnsupportedVllm
from steer_server.vllm_plugin.serve import prepare
from steer_server.vllm_plugin.support import check_supported
from tests.unit.serving import small_dictionary

RAY = ParallelConfig()
RAY.distributed_executor_backend = "ray"  # Asked for at once, it would have to be installed.
LAUNCHED = ParallelConfig()
LAUNCHED.distributed_executor_backend = "external_launcher"


def config(**parallel: Any) -> SimpleNamespace:
    """What `check_supported` reads of a VllmConfig."""
    return SimpleNamespace(
        parallel_config=ParallelConfig(**parallel),
        cache_config=CacheConfig(),
        speculative_config=None,
        diffusion_config=None,
        model_config=SimpleNamespace(is_diffusion=False),
        kv_transfer_config=None,
    )


def test_one_api_server_is_served_and_several_are_refused_by_name() -> None:
    check_supported(config())

    with pytest.raises(UnsupportedVllm, match="--api-server-count"):
        check_supported(config(_api_process_count=2))


@pytest.mark.parametrize(
    ("what", "parallel", "others"),
    [
        ("--kv-transfer-config", {}, {"kv_transfer_config": object()}),
        ("speculative decoding", {}, {"speculative_config": object()}),
        ("data parallelism", {"data_parallel_size": 2}, {}),
        ("dual-batch overlap", {"enable_dbo": True}, {}),
        ("context parallelism", {"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, {}),
        ("context parallelism", {"prefill_context_parallel_size": 2}, {}),
        ("Ray", {}, {"parallel_config": RAY}),
        ("an external launcher", {}, {"parallel_config": LAUNCHED}),
        ("diffusion", {}, {"diffusion_config": object()}),
        ("diffusion", {}, {"model_config": SimpleNamespace(is_diffusion=True)}),
        ("fast prefill", {}, {"cache_config": CacheConfig(kv_sharing_fast_prefill=True)}),
    ],
)
def test_what_edits_do_not_work_with_is_refused_by_name(
    what: str, parallel: dict[str, Any], others: dict[str, Any]
) -> None:
    refused = config(**parallel)
    vars(refused).update(others)

    with pytest.raises(UnsupportedVllm, match=what):
        check_supported(refused)


def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.29.3")

    with pytest.raises(UnsupportedVllm, match=r"vLLM 0\.29\.3 is not supported; install 0\.30 or"):
        check_supported(config())


@pytest.mark.parametrize(
    ("name", "value"), [("worker_cls", "their.Worker"), ("scheduler_cls", "their.Scheduler")]
)
def test_plain_vllm_does_not_replace_a_worker_or_scheduler_that_somebody_chose(
    tmp_path: Path, name: str, value: str
) -> None:
    stored = small_dictionary()
    save(tmp_path / "d", stored.card, stored.dictionary, stored.statistics)
    arguments = EngineArgs(model="m")
    setattr(arguments, name, value)

    with pytest.raises(UnsupportedVllm, match=rf"{name}.*{value}"):
        prepare(arguments, pytest.fail, {"d": str(tmp_path / "d")})


def test_plain_vllm_refuses_a_dictionary_of_a_site_that_is_not_served(tmp_path: Path) -> None:
    stored = small_dictionary()
    card = replace(stored.card, site=Site.parse("mlp_act.1"))
    save(tmp_path / "d", card, stored.dictionary, stored.statistics)

    with pytest.raises(DictionaryMismatch, match=r"trained at mlp_act\.1, which vLLM does not"):
        prepare(SimpleNamespace(), pytest.fail, {"d": str(tmp_path / "d")})


@pytest.mark.parametrize("folders", [{}, {"d": "unread"}])
def test_vllms_rust_front_end_is_refused_with_dictionaries_and_without(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")

    with pytest.raises(UnsupportedVllm, match="unset VLLM_USE_RUST_FRONTEND"):
        prepare(SimpleNamespace(), pytest.fail, folders)
