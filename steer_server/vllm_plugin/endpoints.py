"""Refuses edits where vLLM's HTTP server would drop them and answer as if there were none."""

import functools
import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import VLLMValidationError

from steer_server.vllm_plugin import KEY

_APP = "vllm.entrypoints.launchers.app"
_BEAM_SEARCHES = {
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.speech_to_text.transcription.protocol": "TranscriptionRequest",
    "vllm.entrypoints.speech_to_text.translation.protocol": "TranslationRequest",
}
TAKING = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
"""The paths whose `vllm_xargs` reach the engine, behind whatever prefix the server has."""
_PASSING = (
    *TAKING,
    # One of these, by its body.
    "/invocations",
    # What these answer with has the edits for /inference/v1/generate, which takes them in `sampling_params.extra_args`.
    *(f"{path}/render" for path in TAKING),
    # Nothing is generated here.
    "/tokenize",
    "/v1/messages/count_tokens",
)


def guard() -> None:
    """For a process of vLLM's HTTP server, before it makes its app; elsewhere, and once it is done, it does nothing."""
    module: Any = sys.modules.get(_APP)
    if hasattr(module, "_steer"):
        return
    for name, kind in _BEAM_SEARCHES.items():
        # The app will need it, whatever has been imported by now.
        loaded = sys.modules.get(name) if module is None else import_module(name)
        if loaded is not None:
            _refuse_beam_search(getattr(loaded, kind))
    if module is not None:
        module._steer = True
        add_middleware = module.init_entrypoints_middleware

        @functools.wraps(add_middleware)
        def init_entrypoints_middleware(args: Any, app: Any, *rest: Any, **named: Any) -> None:
            app.add_middleware(RefuseWhereDropped)
            add_middleware(args, app, *rest, **named)

        module.init_entrypoints_middleware = init_entrypoints_middleware


def _refuse_beam_search(request: Any) -> None:
    convert = request.to_beam_search_params
    if hasattr(convert, "_steer"):
        return

    @functools.wraps(convert)
    def checked(self: Any, *rest: Any, **named: Any) -> Any:
        if KEY in (self.vllm_xargs or {}):
            raise VLLMValidationError("edits do not work with beam search", parameter=KEY)
        return convert(self, *rest, **named)

    checked._steer = True  # type: ignore[attr-defined]
    request.to_beam_search_params = checked


class RefuseWhereDropped:
    """ASGI middleware: 400 to a request with edits where they would be dropped."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] == "POST"
        if not asks or scope["path"].rstrip("/").endswith(_PASSING):
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        if _has_edits(b"".join(message.get("body", b"") for message in messages)):
            await _refusal(scope["path"])(scope, receive, send)
        else:
            await self._app(scope, _first(messages, receive), send)


def _first(messages: list[Message], receive: Receive) -> Callable[[], Any]:
    async def next_message() -> Message:
        return messages.pop(0) if messages else await receive()

    return next_message


def _has_edits(body: bytes) -> bool:
    if b"vllm_xargs" not in body:
        return False
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    given = content.get("vllm_xargs") if isinstance(content, dict) else None
    return isinstance(given, dict) and KEY in given


def _refusal(path: str) -> JSONResponse:
    """As vLLM words its own."""
    error = {
        "message": f"edits do not work at {path}, which knows no vllm_xargs; they do at {', '.join(TAKING)}",
        "type": "BadRequestError",
        "param": KEY,
        "code": 400,
    }
    return JSONResponse({"error": error}, status_code=400)
