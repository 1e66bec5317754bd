"""What is refused when an engine starts: settings of vLLM, and dictionaries that it cannot serve."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import CacheConfig, ParallelConfig

from steer_server.dictionary.files import save
from steer_server.dictionary.site import Site
from steer_server.errors import DictionaryMismatch, UnsupportedVllm
from steer_server.vllm_plugin.serve import prepare
from steer_server.vllm_plugin.support import check_supported
from tests.unit.serving import small_dictionary


def config(**parallel: int) -> SimpleNamespace:
    """What `check_supported` reads of a VllmConfig."""
    return SimpleNamespace(
        parallel_config=ParallelConfig(**parallel),
        cache_config=CacheConfig(),
        speculative_config=None,
    )


def test_one_api_server_is_served_and_several_are_refused_by_name() -> None:
    check_supported(config())

    with pytest.raises(UnsupportedVllm, match="--api-server-count"):
        check_supported(config(_api_process_count=2))


def test_plain_vllm_refuses_a_dictionary_of_a_site_that_is_not_served(tmp_path: Path) -> None:
    stored = small_dictionary()
    card = replace(stored.card, site=Site.parse("mlp_act.1"))
    save(tmp_path / "d", card, stored.dictionary, stored.statistics)

    with pytest.raises(DictionaryMismatch, match=r"trained at mlp_act\.1, which vLLM does not"):
        prepare(SimpleNamespace(), pytest.fail, {"d": str(tmp_path / "d")})
