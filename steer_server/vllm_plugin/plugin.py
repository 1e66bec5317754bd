"""Plain vLLM with steer installed: the entry point of the group `vllm.general_plugins`.

Without `STEER_DICTIONARIES` nothing changes but that a request with edits is refused instead of run without them, and
vLLM's Rust front-end, whose requests nobody could refuse, at start. With it (`name=folder`, separated by commas) every engine of the process gets the sites of those dictionaries, and requests
carry programs as JSON: `vllm_xargs={"steer": "..."}` over HTTP, `SamplingParams(extra_args={"steer": ...})` in Python.
A full answer has `{"steer": {"0": {"edits": [...], "activations": [...]}}}` in its `kv_transfer_params`, one entry for
each sequence. vLLM has that field for the first of several prompts of one request, and neither in streams nor in batches of chats;
whatever was not proved ends with an error there, too. HTTP endpoints that know no `vllm_xargs` refuse edits.

`STEER_DISABLE=1` leaves vLLM alone altogether.

vLLM calls it in each of its processes. Where requests come in, `EngineArgs` is loaded already; nothing is imported here
that the other processes would pay for.
"""

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

DICTIONARIES, SLOTS, DISABLE = "STEER_DICTIONARIES", "STEER_SLOTS", "STEER_DISABLE"


def register() -> None:
    """Makes the engines that this process starts from now on admit programs, or refuse them."""
    loaded = sys.modules.get("vllm.engine.arg_utils")
    if os.environ.get(DISABLE) == "1" or loaded is None or hasattr(loaded.EngineArgs, "_steer"):
        return
    arguments = loaded.EngineArgs
    arguments._steer = True
    create = arguments.create_engine_config

    @functools.wraps(create)
    def create_engine_config(self: Any, *rest: Any, **named: Any) -> Any:
        from steer_server.vllm_plugin import KEY, serve

        if KEY in (self.additional_config or {}):
            # An engine of steer's own, which sees to everything itself.
            serve.leave_alone()
            return create(self, *rest, **named)
        return serve.prepare(self, lambda: create(self, *rest, **named), _dictionaries(os.environ))

    arguments.create_engine_config = create_engine_config


def _dictionaries(environ: Mapping[str, str]) -> dict[str, str]:
    entries = [entry for entry in environ.get(DICTIONARIES, "").split(",") if entry]
    found = {name: folder for name, _, folder in (entry.partition("=") for entry in entries)}
    if not all(name and folder for name, folder in found.items()):
        sys.exit(f"{DICTIONARIES}: {environ[DICTIONARIES]!r} is not NAME=FOLDER,NAME=FOLDER")
    return found
