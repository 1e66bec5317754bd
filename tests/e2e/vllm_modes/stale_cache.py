"""Run by test_vllm_modes.py with vLLM's compile-cache key made blind to the sites: what that key is for."""

from pathlib import Path

import pytest

from steer_server.dictionary.site import Site
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.errors import EngineUnavailable
from tests.e2e.engines import use_cache
from tests.e2e.models import make_tiny_llama
from tests.e2e.test_compiled import run_plain_vllm


@pytest.mark.timeout(900)
async def test_a_model_compiled_without_the_op_is_never_served(
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    tiny = make_tiny_llama(tmp_path / "tiny", model_path)
    await run_plain_vllm(tiny, [1, 2, 3])
    settings = EngineSettings(
        str(tiny),
        (Site("resid_post", 1),),
        max_model_len=512,
        max_num_seqs=4,
        dtype="float32",
        kv_cache_gib=1,
    )

    with pytest.raises(EngineUnavailable, match="did not start"):
        await VllmEngine.start(settings)

    assert "the warm-up of the compiled model never called the op" in capfd.readouterr().out
