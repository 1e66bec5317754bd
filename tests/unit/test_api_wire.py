"""Laws of the wire: whatever comes is understood or refused by name; what is echoed means the same again."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from steer.v1 import activations_pb2, edits_pb2, steering_pb2

from steer_client import ablate, active, add, clamp, limit, patch, scale
from steer_server.api.edits import read_edits, write_edits
from steer_server.api.wire import ResolvedRequest, Served, limits, read_encode, read_generation
from steer_server.dictionary.edits import Edit
from steer_server.errors import SteerError
from steer_server.registry import Registry
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import D_MODEL, N_FEATURES, NAME, small_dictionary

REGISTRY = Registry()
REGISTRY.add(NAME, small_dictionary())
ENGINE = FakeEngine(D_MODEL)

_SCALARS = {
    FieldDescriptor.CPPTYPE_UINT32: st.sampled_from([1, 5, 9, 30, 3, 4, 0, 31, 32, 64, 2**32 - 1]),
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from(
        [1, 2, 5, -1, 0, 30, -6, 64, 2**31 - 1, -(2**31)]
    ),
    FieldDescriptor.CPPTYPE_UINT64: st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1]),
    FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from([0.5, 1.0]) | st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from([NAME, NAME, NAME, NAME, "\x00é", "other", ""]),
    FieldDescriptor.CPPTYPE_ENUM: st.sampled_from([1, 1, 1, 2, 4, 0, 3, 9]),
}
# Mostly there; a few at most.
PRESENCES = st.sampled_from([1, 1, 1, 1, 0])
COUNTS = st.sampled_from([1, 0, 0, 2])


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """Any message of this kind, with values that tend to be nearly right."""
    message = kind()
    for field in draw(st.permutations(list(kind.DESCRIPTOR.fields))):
        if field.containing_oneof and message.WhichOneof(field.containing_oneof.name):
            continue
        for _ in range(draw(COUNTS if field.is_repeated else PRESENCES)):
            if field.message_type:
                value = draw(messages(field.message_type._concrete_class))
                part = getattr(message, field.name)
                (part.add() if field.is_repeated else part).CopyFrom(value)
            elif field.is_repeated:
                getattr(message, field.name).append(draw(_SCALARS[field.cpp_type]))
            else:
                setattr(message, field.name, draw(_SCALARS[field.cpp_type]))
    return message


def outcome(read: Coroutine[Any, Any, ResolvedRequest]) -> tuple[ResolvedRequest | None, str]:
    """The request, or the field at fault."""
    try:
        return asyncio.run(read), ""
    except SteerError as error:
        return None, error.field


@settings(max_examples=200, deadline=None)
@given(messages(steering_pb2.Generation))
def test_any_generation_is_understood_or_refused_by_field(message):
    request, field = outcome(read_generation(message, Served(ENGINE, REGISTRY), "generation"))

    if request is None:
        assert field.startswith("generation.")
    else:
        assert 1 <= len(request.prompt_token_ids) < ENGINE.max_model_len
        assert len(request.prompt_token_ids) + request.sampling.max_tokens <= ENGINE.max_model_len


@settings(max_examples=100, deadline=None)
@given(messages(activations_pb2.EncodeRequest))
def test_any_encode_request_is_understood_or_refused_by_field(message):
    request, field = outcome(read_encode(message, ENGINE, REGISTRY))

    if request is None:
        assert field.startswith(("prompt", "read_outs"))
    else:
        assert all(entry.complete and not entry.generated for entry in request.program.read_outs)


VALUES = st.floats(-1e6, 1e6, width=32)
FEATURES = st.tuples(st.just(NAME), st.integers(0, N_FEATURES - 2))
SCOPES = st.fixed_dictionaries(
    {
        "only": st.sampled_from([(), ("prompt",), ("generated",), ("generated", "prompt")]),
        "exclude": st.lists(st.integers(-3, 63), max_size=3),
    },
    optional={
        "at": st.lists(st.integers(-3, 63), max_size=3),
        "windows": st.lists(st.tuples(st.integers(-3, 63), st.none() | st.integers(-3, 64))),
        "tokens": st.lists(st.integers(0, 127), max_size=3),
        "exclude_tokens": st.lists(st.integers(0, 127), max_size=3),
        "when": st.just(active()) | st.just(active((NAME, 4), above=0.5)),
    },
)
PATCHES = st.dictionaries(st.integers(-3, 63), VALUES, min_size=1, max_size=4)
LIMITS = limits(ENGINE)


@st.composite
def edits(draw: st.DrawFn) -> edits_pb2.Edit:
    feature, scope, value = draw(FEATURES), draw(SCOPES), draw(VALUES)
    unit = draw(st.sampled_from(["activation", "max", "row"]))
    kinds = [
        lambda: ablate(feature, **scope),
        lambda: clamp(feature, value, unit, **scope),
        lambda: scale(feature, value, **scope),
        lambda: add(feature, value, draw(st.sampled_from([unit, "norm"])), **scope),
        lambda: limit(feature, value, value + draw(st.floats(0, 9)), unit, **scope),
        lambda: limit(feature, high=value, unit=unit, **scope),
        lambda: patch(feature, draw(PATCHES), unit, **scope),
    ]
    return draw(st.sampled_from(kinds))()


@settings(max_examples=200, deadline=None)
@given(st.lists(edits(), max_size=4, unique_by=lambda edit: edit.feature))
def test_resolved_edits_mean_the_same_when_they_are_sent_again(given_edits):
    resolved = read_edits(given_edits, REGISTRY, LIMITS, "edits")
    echoed = write_edits(resolved)

    again = read_edits(echoed, REGISTRY, LIMITS, "edits")

    assert write_edits(again) == echoed
    assert [entry.scope for entry in again] == [entry.scope for entry in resolved]
    assert [entry.when for entry in again] == [entry.when for entry in resolved]
    assert [type(entry.edit) for entry in again] == [type(entry.edit) for entry in resolved]
    for entry, before in zip(again, resolved, strict=True):
        assert numbers(entry.edit) == pytest.approx(numbers(before.edit), rel=1e-6)


def numbers(edit: Edit) -> dict[str, float]:
    found = vars(edit).copy()
    return found | {str(position): value for position, value in found.pop("values", ())}
