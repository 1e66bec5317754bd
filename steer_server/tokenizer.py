"""The model's tokenizer, as the API sees it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from steer_server.errors import InvalidRequest

_SHORT = 4096
"""Characters of a text that is encoded at once, in the event loop."""


class ModelTokenizer:
    """The real `generation.Tokenizer`, around one of vLLM's.

    Long texts take seconds, and no two threads may use one tokenizer: they have a copy in a thread of their own, and short
    ones do not wait behind them.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.max_token_length: int = tokenizer.max_chars_per_token
        self._tokenizer = tokenizer
        self._for_long = deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._piece = lru_cache(maxsize=65536)(lambda token: tokenizer.decode([token]))

    @property
    def chats(self) -> bool:
        return bool(self._tokenizer.chat_template)

    async def encode(self, text: str, special: bool = True) -> list[int]:
        return await self._run(len(text), _encode, text, special)

    async def chat(self, messages: Sequence[Mapping[str, str]], continue_last: bool) -> list[int]:
        length = sum(len(message["content"]) for message in messages)
        return await self._run(length, _chat, messages, continue_last)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [self._piece(token) for token in token_ids]

    async def _run(self, length: int, call: Callable[..., list[int]], *arguments: Any) -> list[int]:
        if length <= _SHORT:
            return call(self._tokenizer, *arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, call, self._for_long, *arguments)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=special)


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], continue_last: bool) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=not continue_last,
            continue_final_message=continue_last,
        )
    # A template may raise what it likes of what it is given.
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"the model's chat template refuses it: {error}") from error
    # The template has put in the special tokens.
    return _encode(tokenizer, text, False)
