"""Starts engines with vLLM settings that `EngineSettings` does not have, and says which modes vLLM runs in."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import envs
from vllm.config import CompilationMode
from vllm.v1.engine.async_llm import AsyncLLM

from steer_server.dictionary.files import StoredDictionary
from steer_server.engine import EngineSettings, VllmEngine, _engine_args, _set_environment
from steer_server.vllm_plugin import KEY

MODES = set(filter(None, os.environ.get("STEER_TEST_VLLM", "").split(",")))
"""Set by test_vllm_modes.py for the processes that it starts."""


def modes_of(engine: VllmEngine) -> set[str]:
    """The modes of vllm_modes/sitecustomize.py that vLLM runs in."""
    config = engine._llm.vllm_config
    on = {
        "v2": config.use_v2_model_runner,
        "async": config.scheduler_config.async_scheduling,
        "kernels": bool(config.additional_config[KEY].get("kernels")),
        "piecewise": config.compilation_config.mode == CompilationMode.VLLM_COMPILE,
    }
    return {name for name, is_on in on.items() if is_on}


def use_cache(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on vLLM keeps what it compiles in `folder`.

    What it knows of model classes stays: for each it would start a process, which takes ten seconds.
    """
    known = Path(envs.VLLM_CACHE_ROOT) / "modelinfos"
    known.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / "modelinfos").symlink_to(known)
    patch.setenv("VLLM_CACHE_ROOT", str(folder))


@asynccontextmanager
async def started(
    settings: EngineSettings,
    dictionaries: dict[str, StoredDictionary],
    kernels: bool = False,
    **vllm_settings: Any,
) -> AsyncIterator[VllmEngine]:
    """A running engine; `vllm_settings` are fields of vLLM's AsyncEngineArgs and win.

    `kernels` lets Triton's kernels do the work on CPU, too.
    """
    _set_environment(settings)
    args = _engine_args(settings)
    if kernels:
        args.additional_config[KEY]["kernels"] = True
    for name, value in vllm_settings.items():
        setattr(args, name, value)
    engine = VllmEngine(AsyncLLM.from_engine_args(args), settings)
    try:
        assert ("v2" in modes_of(engine)) == ("v2" in MODES)
        for name, stored in dictionaries.items():
            await engine.add_dictionary(name, stored)
        yield engine
    finally:
        await engine.shutdown()
