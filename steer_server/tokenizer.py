"""The model's tokenizer, as the API sees it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from steer_server.errors import InvalidRequest


class ModelTokenizer:
    """The real `generation.Tokenizer`, around one of transformers."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._piece = lru_cache(maxsize=65536)(lambda token: tokenizer.decode([token]))

    @property
    def chats(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    def chat(self, messages: Sequence[Mapping[str, str]], continue_last: bool) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
            )
        # A template may raise what it likes of what it is given.
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(f"the model's chat template refuses it: {error}") from error
        # The template has put in the special tokens.
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [self._piece(token) for token in token_ids]
