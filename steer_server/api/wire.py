"""Requests from proto to domain, with all validation; an error names the proto path of the value at fault."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from steer.v1 import activations_pb2, edits_pb2, steering_pb2

from steer_server.admission import (
    MAX_READ_OUTS,
    check,
    check_scopes,
    check_slots,
)
from steer_server.api.calls import require_observe
from steer_server.api.edits import Limits, check_feature, read_edits
from steer_server.api.presets import Presets
from steer_server.api.prompts import read_prompt
from steer_server.api.read_outs import read_read_outs
from steer_server.errors import InvalidRequest, SteerError
from steer_server.generation import Engine, Sampling
from steer_server.program import (
    MAX_RELATIVE_SIZE,
    Condition,
    FeatureEdit,
    Oversize,
    Program,
    ReadOut,
)
from steer_server.registry import Registry
from steer_server.units import finite

MAX_STOPS = 16
MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63 - 1
MAX_SEQUENCES = 16
MAX_PRESETS = 8
MAX_STOP_WHEN = 8


@dataclass(frozen=True)
class Served:
    """What requests are about."""

    engine: Engine
    registry: Registry
    presets: Presets = field(default_factory=Presets)


@dataclass(frozen=True)
class ResolvedRequest:
    """What a client asked for, checked against this model and its dictionaries."""

    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    program: Program
    n: int = 1
    """Sequences to draw."""
    stop_when: tuple[Condition, ...] = ()
    """The generation ends with the first generated token on which one holds."""
    forced: int = 0
    """So many tokens at the prompt's end count as generated."""


class _Steered(Protocol):
    """A message with edits."""

    @property
    def edits(self) -> Sequence[edits_pb2.Edit]: ...
    @property
    def presets(self) -> Sequence[str]: ...
    @property
    def size_limit(self) -> edits_pb2.SizeLimit: ...
    def HasField(self, field_name: Any, /) -> bool: ...


async def read_generation(
    message: steering_pb2.Generation, served: Served, path: str, *, many: bool = False
) -> ResolvedRequest:
    """The generation asked for at `path`; max_tokens is cut to what the context leaves.

    Without `many` it has to be of one sequence.
    """
    prompt = await read_prompt(message.prompt, served.engine, f"{path}.prompt")
    room = served.engine.max_model_len - len(prompt)
    sampling = _read_sampling(message.sampling, room, f"{path}.sampling")
    n = _read_n(message.sampling, many, f"{path}.sampling.n")
    if sampling.seed is not None and sampling.seed + n - 1 > MAX_SEED:
        raise InvalidRequest(
            f"{sampling.seed} for the first of {n} sequences; the last one's may be {MAX_SEED}",
            field=f"{path}.sampling.seed",
        )
    if message.read_outs:
        require_observe(f"{path}.read_outs")
    if message.stop_when:
        require_observe(f"{path}.stop_when")
    read_outs = read_read_outs(message.read_outs, served.registry, f"{path}.read_outs")
    computed = sampling.max_tokens
    program = read_program(message, served, len(prompt), path, read_outs, computed=computed)
    stop_when = _read_stop_when(message.stop_when, served.registry, f"{path}.stop_when")
    return ResolvedRequest(prompt, sampling, program, n, stop_when)


def read_program(
    message: _Steered,
    served: Served,
    prompt_length: int,
    path: str,
    read_outs: tuple[ReadOut, ...] = (),
    *,
    computed: int | None = None,
) -> Program:
    """The program of the message at `path`, its presets first, checked and with absolute positions.

    Scopes that hold at none of the prompt's positions and the `computed` generated ones are refused.
    """
    prefix = f"{path}." if path else ""
    registry, edits, sources = served.registry, list[FeatureEdit](), list[str]()
    if len(message.presets) > MAX_PRESETS:
        raise InvalidRequest(
            f"{len(message.presets)} presets; at most {MAX_PRESETS}", field=f"{prefix}presets"
        )
    for index, name in enumerate(message.presets):
        where = f"presets[{index}]"
        preset = served.presets.get(name, field=f"{prefix}{where}")
        edits += _of_preset(preset.edits, served, f"{prefix}{where}")
        sources += [where] * len(preset.edits)
    own = read_edits(message.edits, registry, limits(served.engine), f"{prefix}edits")
    sources += [f"edits[{index}]" for index in range(len(own))]
    limit = {}
    if message.HasField("size_limit"):
        limit = _read_size_limit(message.size_limit, f"{prefix}size_limit")
    program = Program((*edits, *own), read_outs, **limit)
    with _within(path, sources):
        program = program.resolve(prompt_length)
        resident = dict(registry)
        check(program, resident)
        check_slots(program.features, resident, served.engine.slot_load.capacity)
        if computed is not None:
            check_scopes(program, prompt_length, computed)
    return program


def read_preset(messages: Sequence[edits_pb2.Edit], served: Served) -> Program:
    """The edits of a preset as a program, checked but for what depends on a prompt."""
    program = Program(read_edits(messages, served.registry, limits(served.engine), "edits"))
    resident = dict(served.registry)
    check(program, resident)
    check_slots(program.features, resident, served.engine.slot_load.capacity)
    return program


def limits(engine: Engine) -> Limits:
    """What positions and tokens may be."""
    return Limits(engine.max_model_len, engine.tokenizer.vocab_size)


async def read_encode(
    message: activations_pb2.EncodeRequest, engine: Engine, registry: Registry
) -> ResolvedRequest:
    """A generation of one token, for the sake of the prompt's activations."""
    prompt = await read_prompt(message.prompt, engine, "prompt")
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
        for entry in read_read_outs(message.read_outs, registry, "read_outs")
    )
    program = Program(read_outs=read_outs)
    with _within("", []):
        check(program, dict(registry))
    return ResolvedRequest(prompt, Sampling(max_tokens=1, temperature=0.0), program)


def _of_preset(
    edits: Sequence[edits_pb2.Edit], served: Served, path: str
) -> tuple[FeatureEdit, ...]:
    try:
        return read_edits(edits, served.registry, limits(served.engine), "edits")
    except SteerError as error:
        # The request has no path to what is inside a preset.
        error.args = (f"{error.field}: {error}",)
        error.field = path
        raise


def _read_size_limit(message: edits_pb2.SizeLimit, path: str) -> dict[str, Any]:
    size = message.max_relative_size
    if not 0 < size < MAX_RELATIVE_SIZE:
        raise InvalidRequest(
            f"{size} is not above 0 and below {MAX_RELATIVE_SIZE:g}",
            field=f"{path}.max_relative_size",
        )
    if message.oversize not in _OVERSIZE:
        known = ", ".join(edits_pb2.Oversize.keys()[1:])
        raise InvalidRequest(f"{message.oversize} is none of {known}", field=f"{path}.oversize")
    return {"max_relative_size": size, "oversize": _OVERSIZE[message.oversize]}


_OVERSIZE = {
    edits_pb2.OVERSIZE_UNSPECIFIED: Oversize.REJECT,
    edits_pb2.OVERSIZE_REJECT: Oversize.REJECT,
    edits_pb2.OVERSIZE_CLAMP: Oversize.CLAMP,
    edits_pb2.OVERSIZE_WARN: Oversize.WARN,
}


def _read_stop_when(
    messages: Sequence[edits_pb2.Condition], registry: Registry, path: str
) -> tuple[Condition, ...]:
    if len(messages) > MAX_STOP_WHEN:
        raise InvalidRequest(f"{len(messages)} conditions; at most {MAX_STOP_WHEN}", field=path)
    found = []
    for index, message in enumerate(messages):
        where = f"{path}[{index}]"
        if not message.dictionary:
            raise InvalidRequest("required", field=f"{where}.dictionary")
        stored = registry.get(message.dictionary, field=f"{where}.dictionary")
        if not message.HasField("feature"):
            raise InvalidRequest("required", field=f"{where}.feature")
        feature = check_feature(message.feature, stored, f"{where}.feature")
        above = finite(message.above, field=f"{where}.above")
        if above < 0:
            raise InvalidRequest(
                f"{above:g} is below 0, and a feature that is not active would be above it",
                field=f"{where}.above",
            )
        found.append(Condition(message.dictionary, feature, above))
    return tuple(found)


def _read_n(message: steering_pb2.Sampling, many: bool, path: str) -> int:
    n = message.n if message.HasField("n") else 1
    if not 1 <= n <= MAX_SEQUENCES:
        raise InvalidRequest(f"{n} is not in 1..{MAX_SEQUENCES}", field=path)
    if n > 1 and not many:
        raise InvalidRequest(f"{n} sequences; one is drawn here", field=path)
    return n


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
        seed=_at_most(message.seed, MAX_SEED, f"{path}.seed") if message.HasField("seed") else None,
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


@contextmanager
def _within(path: str, sources: Sequence[str]) -> Iterator[None]:
    """Errors of a program name their place in the request.

    The program's lists lie at `path` there; `sources` are where its edits come from, if not all from `edits`.
    """

    def source(match: re.Match[str]) -> str:
        index = int(match[1])
        return sources[index] if index < len(sources) else match[0]

    try:
        yield
    except SteerError as error:
        error.args = (_EDIT.sub(source, str(error)),)
        place = _EDIT.sub(source, error.field)
        if place.startswith("presets"):
            # The request has no path to what is inside one.
            place = place.partition(".")[0]
        error.field = ".".join(part for part in (path, place) if part)
        raise


_EDIT = re.compile(r"\bedits\[([0-9]+)\]")
