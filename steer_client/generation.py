"""What a generation is asked for, from Python values to protos."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from steer.v1 import activations_pb2, edits_pb2, prompt_pb2, steering_pb2

PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]] | prompt_pb2.Prompt
"""Text, token ids, or messages such as {"role": "user", "content": "Hello"}."""

_ROLES = {
    "system": prompt_pb2.ROLE_SYSTEM,
    "user": prompt_pb2.ROLE_USER,
    "assistant": prompt_pb2.ROLE_ASSISTANT,
    "tool": prompt_pb2.ROLE_TOOL,
}
_GENERATION = ("edits", "read_outs", "presets", "size_limit", "stop_when")


class Options(TypedDict, total=False):
    """Of a generation: what it edits and reads, and how it draws; as steer.v1.Generation and Sampling say."""

    edits: Sequence[edits_pb2.Edit]
    read_outs: Sequence[activations_pb2.ReadOut]
    presets: Sequence[str]
    size_limit: edits_pb2.SizeLimit
    """See `size_limit` of this package."""
    stop_when: Sequence[edits_pb2.Condition]
    """See `active`."""
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Sequence[str]
    ignore_eos: bool
    logprobs: bool
    n: int


def as_prompt(prompt: PromptLike) -> prompt_pb2.Prompt:
    """A prompt of text, token ids, or messages with `role` and `content`."""
    match prompt:
        case prompt_pb2.Prompt():
            return prompt
        case str():
            return prompt_pb2.Prompt(text=prompt)
        case [{"role": _}, *_]:
            messages = [
                prompt_pb2.ChatMessage(role=_ROLES[entry["role"]], content=entry["content"])
                for entry in prompt
                if isinstance(entry, Mapping)
            ]
            return prompt_pb2.Prompt(chat=prompt_pb2.Chat(messages=messages))
        case _:
            return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=cast(Sequence[int], prompt)))


def generation(prompt: PromptLike, options: Options) -> steering_pb2.Generation:
    given: dict[str, Any] = dict(options)
    of_generation = {key: given.pop(key) for key in _GENERATION if key in given}
    return steering_pb2.Generation(
        prompt=as_prompt(prompt), sampling=steering_pb2.Sampling(**given), **of_generation
    )


def continuation(text: str | Sequence[int]) -> steering_pb2.Continuation:
    if isinstance(text, str):
        return steering_pb2.Continuation(text=text)
    return steering_pb2.Continuation(token_ids=prompt_pb2.TokenIds(ids=text))
