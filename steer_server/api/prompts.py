"""Prompts from proto to token ids."""

from collections.abc import Sequence

from steer.v1 import prompt_pb2, steering_pb2

from steer_server.api.edits import check_vocabulary
from steer_server.errors import InvalidRequest, PromptTooLong, UnsupportedModel
from steer_server.generation import Engine, Tokenizer

MAX_MESSAGES = 1024

_ROLES = {
    prompt_pb2.ROLE_SYSTEM: "system",
    prompt_pb2.ROLE_USER: "user",
    prompt_pb2.ROLE_ASSISTANT: "assistant",
    prompt_pb2.ROLE_TOOL: "tool",
}


async def read_prompt(message: prompt_pb2.Prompt, engine: Engine, path: str) -> tuple[int, ...]:
    """The prompt's token ids: at least one, and fewer than the model's context holds."""
    tokenizer = engine.tokenizer
    match message.WhichOneof("content"):
        case "text":
            where = f"{path}.text"
            _check_length(len(message.text), engine, where)
            ids = await tokenizer.encode(message.text) if message.text else []
        case "token_ids":
            where = f"{path}.token_ids.ids"
            ids = message.token_ids.ids
        case "chat":
            where = f"{path}.chat"
            ids = await _read_chat(message.chat, engine, where)
        case _:
            raise InvalidRequest("required: set text, token_ids or chat", field=path)
    return _checked(ids, engine.max_model_len, tokenizer, where)


async def read_continuation(
    message: steering_pb2.Continuation, engine: Engine, prompt_length: int, path: str
) -> tuple[int, ...]:
    """Its token ids: at least one, and no more than the context leaves room for with one more."""
    tokenizer = engine.tokenizer
    match message.WhichOneof("content"):
        case "text":
            where = f"{path}.text"
            _check_length(len(message.text), engine, where)
            ids = await tokenizer.encode(message.text, special=False)
        case "token_ids":
            where = f"{path}.token_ids.ids"
            ids = message.token_ids.ids
        case _:
            raise InvalidRequest("required: set text or token_ids", field=path)
    return _checked(ids, engine.max_model_len - prompt_length, tokenizer, where)


def _check_length(characters: int, engine: Engine, where: str) -> None:
    """Refuses what is too long by far before much time is spent on it."""
    most = engine.max_model_len * engine.tokenizer.max_token_length
    if characters > most:
        raise PromptTooLong(
            f"{characters} characters; {engine.max_model_len} tokens have {most} at most",
            field=where,
        )


def _checked(ids: Sequence[int], room: int, tokenizer: Tokenizer, where: str) -> tuple[int, ...]:
    if not ids:
        raise InvalidRequest("is empty; the model needs at least one token", field=where)
    if len(ids) >= room:
        raise PromptTooLong(
            f"{len(ids)} tokens; at most {room - 1} leave room for one more", field=where
        )
    check_vocabulary(ids, tokenizer.vocab_size, where)
    return tuple(ids)


async def _read_chat(chat: prompt_pb2.Chat, engine: Engine, path: str) -> Sequence[int]:
    tokenizer = engine.tokenizer
    if not tokenizer.chats:
        raise UnsupportedModel(
            "this model has no chat template; send the conversation as text", field=path
        )
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"{len(chat.messages)} messages; 1 to {MAX_MESSAGES}", field=f"{path}.messages"
        )
    messages = []
    for index, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            known = ", ".join(f"{prompt_pb2.Role.Name(role)} ({role})" for role in _ROLES)
            raise InvalidRequest(
                f"role {message.role} is none of {known}", field=f"{path}.messages[{index}].role"
            )
        messages.append({"role": _ROLES[message.role], "content": message.content})
    _check_length(sum(len(message["content"]) for message in messages), engine, path)
    try:
        return await tokenizer.chat(messages, chat.continue_last)
    except InvalidRequest as error:
        error.field = f"{path}.messages"
        raise
