"""Starts engines with vLLM settings that `EngineSettings` does not have."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import envs
from vllm.v1.engine.async_llm import AsyncLLM

from steer_server.dictionary.files import StoredDictionary
from steer_server.engine import EngineSettings, VllmEngine, _engine_args, _set_environment
from steer_server.vllm_plugin import KEY


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
        for name, stored in dictionaries.items():
            await engine.add_dictionary(name, stored)
        yield engine
    finally:
        await engine.shutdown()
