"""Starts engines with vLLM settings that `EngineSettings` does not have."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from steer_server.dictionary.files import StoredDictionary
from steer_server.engine import EngineSettings, VllmEngine, _engine_args, _set_environment
from steer_server.vllm_plugin import KEY


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
