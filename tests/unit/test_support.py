"""Which of vLLM's settings are refused when an engine starts."""

from types import SimpleNamespace

import pytest
from vllm.config import CacheConfig, ParallelConfig

from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin.support import check_supported


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
