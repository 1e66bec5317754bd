"""Requests from proto to domain, with all validation; an error names the proto path of the value at fault."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from steer.v1 import activations_pb2, edits_pb2, prompt_pb2, steering_pb2

from steer_server.admission import MAX_FEATURES, MAX_READ_OUTS, MAX_TOP_K, check, check_scopes
from steer_server.api.edits import Limits, check_feature, check_vocabulary, read_edits, read_phases
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import InvalidRequest, PromptTooLong, SteerError
from steer_server.generation import Engine, Sampling
from steer_server.program import Program, ReadOut
from steer_server.registry import Registry
from steer_server.units import finite

MAX_STOPS = 16
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class ResolvedRequest:
    """What a client asked for, checked against this model and its dictionaries."""

    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    program: Program


def read_generation(
    message: steering_pb2.Generation, engine: Engine, registry: Registry, path: str
) -> ResolvedRequest:
    """The generation asked for at `path`; max_tokens is cut to what the context leaves."""
    prompt = read_prompt(message.prompt, engine, f"{path}.prompt")
    room = engine.max_model_len - len(prompt)
    sampling = _read_sampling(message.sampling, room, f"{path}.sampling")
    edits = read_edits(message.edits, registry, limits(engine), f"{path}.edits")
    read_outs = _read_read_outs(message.read_outs, registry, f"{path}.read_outs")
    program = admit(Program(edits, read_outs), registry, len(prompt), path)
    with _within(path):
        check_scopes(program, len(prompt), sampling.max_tokens)
    return ResolvedRequest(prompt, sampling, program)


def limits(engine: Engine) -> Limits:
    """What positions and tokens may be."""
    return Limits(engine.max_model_len, engine.tokenizer.vocab_size)


def admit(program: Program, registry: Registry, prompt_length: int, path: str) -> Program:
    """The program with absolute positions, checked against the dictionaries; its lists lie at `path`."""
    with _within(path):
        resolved = program.resolve(prompt_length)
        check(resolved, dict(registry))
    return resolved


def read_encode(
    message: activations_pb2.EncodeRequest, engine: Engine, registry: Registry
) -> ResolvedRequest:
    """A generation of one token, for the sake of the prompt's activations."""
    prompt = read_prompt(message.prompt, engine, "prompt")
    if not message.read_outs:
        raise InvalidRequest(f"required: 1 to {MAX_READ_OUTS} of them", field="read_outs")
    for index, entry in enumerate(message.read_outs):
        if edits_pb2.PHASE_GENERATED in entry.phases:
            raise InvalidRequest(
                "nothing is generated here; leave it empty or name PHASE_PROMPT",
                field=f"read_outs[{index}].phases",
            )
        if entry.skip_cached:
            raise InvalidRequest(
                "every token is read here; leave it out", field=f"read_outs[{index}].skip_cached"
            )
    read_outs = tuple(
        replace(entry, prompt=True, generated=False)
        for entry in _read_read_outs(message.read_outs, registry, "read_outs")
    )
    program = admit(Program(read_outs=read_outs), registry, len(prompt), "")
    return ResolvedRequest(prompt, Sampling(max_tokens=1, temperature=0.0), program)


def read_prompt(message: prompt_pb2.Prompt, engine: Engine, path: str) -> tuple[int, ...]:
    """The prompt's token ids: at least one, and fewer than the model's context holds."""
    match message.WhichOneof("content"):
        case "text":
            where = f"{path}.text"
            ids = tuple(engine.tokenizer.encode(message.text)) if message.text else ()
        case "token_ids":
            where = f"{path}.token_ids.ids"
            ids = tuple(message.token_ids.ids)
            check_vocabulary(ids, engine.tokenizer.vocab_size, where)
        case _:
            raise InvalidRequest("required: set text or token_ids", field=path)
    if not ids:
        raise InvalidRequest("is empty; the model needs at least one token", field=where)
    if len(ids) >= engine.max_model_len:
        raise PromptTooLong(
            f"{len(ids)} tokens; at most {engine.max_model_len - 1} leave room for one more",
            field=where,
        )
    return ids


def _read_sampling(message: steering_pb2.Sampling, room: int, path: str) -> Sampling:
    max_tokens = message.max_tokens if message.HasField("max_tokens") else Sampling.max_tokens
    if max_tokens == 0:
        raise InvalidRequest("0 tokens; at least 1", field=f"{path}.max_tokens")
    temperature = message.temperature if message.HasField("temperature") else 1.0
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise InvalidRequest(
            f"{temperature} is not in 0..{MAX_TEMPERATURE:g}", field=f"{path}.temperature"
        )
    top_p = message.top_p if message.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise InvalidRequest(f"{top_p} is not above 0 and at most 1", field=f"{path}.top_p")
    return Sampling(
        max_tokens=min(max_tokens, room),
        temperature=temperature,
        top_p=top_p,
        top_k=_at_most(message.top_k, 2**31 - 1, f"{path}.top_k"),
        seed=_at_most(message.seed, 2**63 - 1, f"{path}.seed")
        if message.HasField("seed")
        else None,
        stop=_read_stops(message.stop, f"{path}.stop"),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs,
    )


def _at_most(value: int, high: int, path: str) -> int:
    if value > high:
        raise InvalidRequest(f"{value} is over {high}", field=path)
    return value


def _read_stops(stops: Sequence[str], path: str) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"{len(stops)} texts; at most {MAX_STOPS}", field=path)
    for index, text in enumerate(stops):
        if not text:
            raise InvalidRequest("is empty", field=f"{path}[{index}]")
    return tuple(stops)


def _read_read_outs(
    messages: Sequence[activations_pb2.ReadOut], registry: Registry, path: str
) -> tuple[ReadOut, ...]:
    if len(messages) > MAX_READ_OUTS:
        raise InvalidRequest(f"{len(messages)} read-outs; at most {MAX_READ_OUTS}", field=path)
    return tuple(
        _read_read_out(message, registry, f"{path}[{index}]")
        for index, message in enumerate(messages)
    )


def _read_read_out(message: activations_pb2.ReadOut, registry: Registry, path: str) -> ReadOut:
    stored = registry.get(message.dictionary, field=f"{path}.dictionary")
    prompt, generated = read_phases(message.phases, f"{path}.phases")
    if message.stage not in activations_pb2.Stage.values():
        raise InvalidRequest(
            f"stage {message.stage} is neither STAGE_BEFORE_EDITS (1) nor STAGE_AFTER_EDITS (2)",
            field=f"{path}.stage",
        )
    return ReadOut(
        message.dictionary,
        **_read_selection(message, stored, path),
        prompt=prompt,
        generated=generated,
        edited=message.stage == activations_pb2.STAGE_AFTER_EDITS,
        complete=not message.skip_cached,
    )


def _read_selection(
    message: activations_pb2.ReadOut, stored: StoredDictionary, path: str
) -> dict[str, Any]:
    match message.WhichOneof("selection"):
        case "top_k":
            if not 1 <= message.top_k <= MAX_TOP_K:
                raise InvalidRequest(
                    f"{message.top_k} is not in 1..{MAX_TOP_K}", field=f"{path}.top_k"
                )
            return {"top_k": min(message.top_k, stored.card.n_features)}
        case "features":
            where = f"{path}.features.features"
            return {"features": read_features(message.features.features, stored, where)}
        case "above":
            threshold = finite(message.above.threshold, field=f"{path}.above.threshold")
            if not message.above.HasField("row_bytes"):
                return {"above": threshold}
            return {"above": threshold, "row_bytes": message.above.row_bytes}
        case _:
            raise InvalidRequest("set one of top_k, features and above", field=f"{path}.selection")


def read_features(features: Sequence[int], stored: StoredDictionary, path: str) -> tuple[int, ...]:
    """1 to MAX_FEATURES different ones of the dictionary."""
    if not 1 <= len(features) <= MAX_FEATURES:
        raise InvalidRequest(f"{len(features)} features; 1 to {MAX_FEATURES}", field=path)
    for index, feature in enumerate(features):
        check_feature(feature, stored, f"{path}[{index}]")
    if len(set(features)) < len(features):
        raise InvalidRequest("names a feature twice", field=path)
    return tuple(features)


_PROTO_NAMES = {
    "features": "features.features",
    "above": "above.threshold",
    "row_bytes": "above.row_bytes",
}
"""Of a read-out's values that lie deeper in the proto than in a program."""


@contextmanager
def _within(path: str) -> Iterator[None]:
    """Errors of a program name their place in the request, where the program's lists lie at `path`."""
    try:
        yield
    except SteerError as error:
        start, dot, last = error.field.rpartition(".")
        if start.startswith("read_outs"):
            last = _PROTO_NAMES.get(last, last)
        parts = [part for part in (path, f"{start}{dot}{last}") if part]
        error.field = ".".join(parts)
        raise
