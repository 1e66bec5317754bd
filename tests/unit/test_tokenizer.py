"""The real model's tokenizer, as the API sees it."""

import asyncio
import time
from pathlib import Path

import pytest
from steer.v1 import prompt_pb2
from vllm.tokenizers import get_tokenizer

from steer_server.api.prompts import read_prompt
from steer_server.errors import PromptTooLong
from steer_server.tokenizer import ModelTokenizer
from tests.unit.fake_engine import FakeEngine


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> ModelTokenizer:
    return ModelTokenizer(get_tokenizer(str(model_path)), 49152)


async def test_others_go_on_while_a_long_text_is_encoded(tokenizer: ModelTokenizer) -> None:
    text = "".join(f"number {n}; " for n in range(40_000))
    start = time.perf_counter()
    encoding = asyncio.create_task(tokenizer.encode(text))

    ticks = 0
    while not encoding.done():
        assert await tokenizer.encode("a short one does not wait")
        await asyncio.sleep(0)
        ticks += 1

    assert len(await encoding) > 40_000
    assert ticks > 100, f"{ticks} turns of the loop in {time.perf_counter() - start:.2f} s"


async def test_a_text_no_tokens_of_the_context_could_hold_is_refused_unread(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(8)
    engine.tokenizer = tokenizer
    most = engine.max_model_len * tokenizer.max_token_length
    monkeypatch.setattr(tokenizer, "_run", None)
    message = prompt_pb2.ChatMessage(role=prompt_pb2.ROLE_USER, content="a" * (most // 2 + 1))
    talk = prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=[message] * 2))

    with pytest.raises(PromptTooLong) as text:
        await read_prompt(prompt_pb2.Prompt(text="a" * (most + 1)), engine, "prompt")
    with pytest.raises(PromptTooLong) as chat:
        await read_prompt(talk, engine, "prompt")

    assert text.value.field == "prompt.text"
    assert chat.value.field == "prompt.chat"
    assert f"{most + 1} characters" in str(text.value)
