"""Activation patching: a prompt run with some features' activations of another.

As in arXiv 2309.08600, section 4: the target keeps its error term, and only the named features take on the
activations that the source has at the positions paired with theirs.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from steer.v1 import steering_pb2

from steer_server.admission import MAX_EDITS, MAX_FEATURES, MAX_ROW_BYTES
from steer_server.api import events
from steer_server.api.calls import require_observe
from steer_server.api.differences import Activations, compare
from steer_server.api.edits import check_feature, check_vocabulary
from steer_server.api.generations import Generations
from steer_server.api.prompts import read_prompt
from steer_server.api.streams import together
from steer_server.api.wire import ResolvedRequest
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import EngineUnavailable, InvalidRequest, PositionOutOfRange
from steer_server.generation import ActivationRows, Sampling, Tokenizer
from steer_server.program import Program, ReadOut

MAX_SETS = 256
MAX_TOKENS = 256
MAX_LISTED = 128
DEFAULT_LISTED = 10

_SAMPLING = Sampling(max_tokens=1, temperature=0.0, distribution=True)
MAX_NAMED = 16_384
"""Features read by name, of a dictionary whose activations may be negative."""


class _Ran(NamedTuple):
    """What came of a prompt."""

    distribution: NDArray[np.float32]
    """Log-probabilities of the next token, [vocab_size]."""
    activations: Activations


class _Likeliest(NamedTuple):
    """What an answer says of a distribution."""

    ids: list[int]
    """Of the likeliest tokens, the first one first."""
    logprobs: list[float]
    asked: list[float]
    """Log-probabilities of the tokens that were asked for."""


class _Summary(NamedTuple):
    """What came of a set of features, in nats; the prompts' distributions are p and q, this one's is r."""

    next: _Likeliest
    source_kl: float
    """KL(p || r)."""
    target_kl: float
    """KL(q || r)."""
    reverse_source_kl: float
    """KL(r || p)."""


async def answer(
    generations: Generations, request_id: str, request: steering_pb2.PatchRequest
) -> steering_pb2.PatchResponse:
    """What SteeringService.Patch returns."""
    engine = generations.engine
    # Which features differ tells of the texts what activations do.
    require_observe("dictionary")
    generations.registry.get(request.dictionary, field="dictionary")
    source_ids = await read_prompt(request.source, engine, "source")
    target_ids = await read_prompt(request.target, engine, "target")
    # Another one may have its name by now.
    stored = generations.registry.get(request.dictionary, field="dictionary")
    pairs = _read_pairs(request.positions, len(source_ids), len(target_ids))
    sets = _read_sets(request, stored)
    check_vocabulary(request.token_ids, engine.tokenizer.vocab_size, "token_ids")
    listed = _read_listed(request)

    async def run(name: str, ids: Sequence[int], program: Program) -> _Ran:
        resolved = ResolvedRequest(tuple(ids), _SAMPLING, program)
        return await _run(generations, f"{request_id}:{name}", resolved)

    wanted = None if request.all_features else sorted({f for chosen in sets for f in chosen})
    read = Program(read_outs=_read_outs(request.dictionary, stored, wanted))
    # What is patched is of the dictionary that was read.
    with generations.uses.hold({request.dictionary: stored}):
        source, target = await together(
            [run("source", source_ids, read), run("target", target_ids, read)]
        )
        difference = await asyncio.to_thread(compare, source.activations, target.activations, pairs)
        if request.all_features:
            sets = [difference.features, *sets]
        differ = set(difference.features)
        patched = [[feature for feature in chosen if feature in differ] for chosen in sets]
        _check_room(patched, generations, request.all_features)

        # Sets share features: each one's edit is made once.
        together_patched = set[int]().union(*patched)
        edits = await asyncio.to_thread(difference.edits, request.dictionary, together_patched)

        async def patch(number: int, features: Sequence[int]) -> _Summary:
            ran = target
            if features:
                program = Program(tuple(edits[feature] for feature in features))
                ran = await run(str(number), target_ids, program)
            # Of a large vocabulary each takes long and much memory.
            return await asyncio.to_thread(
                _summary,
                source.distribution,
                target.distribution,
                ran.distribution,
                listed,
                request.token_ids,
            )

        ran = await together(patch(number, features) for number, features in enumerate(patched))
        norms = await asyncio.to_thread(
            lambda: [difference.norms(stored, features) for features in patched]
        )

    next_token = partial(_next_token, engine.tokenizer)
    return steering_pb2.PatchResponse(
        source=events.prompt_tokens(source_ids, engine.tokenizer),
        target=events.prompt_tokens(target_ids, engine.tokenizer),
        source_next=next_token(_likeliest(source.distribution, listed, request.token_ids)),
        target_next=next_token(_likeliest(target.distribution, listed, request.token_ids)),
        source_target_kl=kl(source.distribution, target.distribution),
        results=[
            steering_pb2.PatchResult(
                next=next_token(found.next),
                source_kl=found.source_kl,
                target_kl=found.target_kl,
                edit_norm=float(np.linalg.norm(lengths)),
                patched_features=len(features),
                reverse_source_kl=found.reverse_source_kl,
                mean_edit_norm=lengths.sum() / len(target_ids),
            )
            for found, features, lengths in zip(ran, patched, norms, strict=True)
        ],
        differing_features=difference.features,
    )


def kl(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """KL(p || q) in nats, of log-probabilities."""
    possible = np.isfinite(p)
    mine, other = p[possible].astype(np.float64), q[possible].astype(np.float64)
    return float((np.exp(mine) * (mine - other)).sum())


def _summary(
    p: NDArray[np.float32],
    q: NDArray[np.float32],
    r: NDArray[np.float32],
    listed: int,
    asked: Sequence[int],
) -> _Summary:
    return _Summary(_likeliest(r, listed, asked), kl(p, r), kl(q, r), kl(r, p))


def _next_token(tokenizer: Tokenizer, found: _Likeliest) -> steering_pb2.NextToken:
    return steering_pb2.NextToken(
        ids=found.ids,
        pieces=tokenizer.pieces(found.ids),
        logprobs=found.logprobs,
        token_logprobs=found.asked,
    )


async def _run(generations: Generations, request_id: str, request: ResolvedRequest) -> _Ran:
    run = generations.begin("Patch", request_id, request)
    parts: list[ActivationRows] = []
    distribution = None
    async with aclosing(run.outputs()) as outputs:
        async for output in outputs:
            for rows in output.activations:
                _check_complete(rows, request.program.read_outs[rows.read_out])
                parts.append(rows)
            if output.distribution is not None:
                distribution = output.distribution
    if distribution is None:
        raise EngineUnavailable("the engine returned no distribution")
    return _Ran(distribution, Activations.gather(parts))


def _check_complete(rows: ActivationRows, read_out: ReadOut) -> None:
    full = np.diff(rows.row_splits) >= read_out.limit
    if read_out.above is not None and full.any():
        position = int(rows.positions[full.argmax()])
        raise InvalidRequest(
            f"more than {read_out.limit} features are active at position {position}; name the "
            "features to patch",
            field="all_features",
        )


def _read_outs(
    name: str, stored: StoredDictionary, wanted: Sequence[int] | None
) -> tuple[ReadOut, ...]:
    """Read-outs of the prompt that find the wanted features' activations, or all of them."""
    if stored.dictionary.non_negative:
        return (ReadOut(name, above=0.0, row_bytes=MAX_ROW_BYTES, generated=False),)
    # One that may be below 0 has to be asked for.
    features = range(stored.card.n_features) if wanted is None else wanted
    if len(features) > MAX_NAMED:
        raise InvalidRequest(
            f"{len(features)} features of a dictionary whose activations may be negative; at most {MAX_NAMED}",
            field="sets" if wanted is not None else "all_features",
        )
    parts = [features[i : i + MAX_FEATURES] for i in range(0, len(features), MAX_FEATURES)]
    return tuple(ReadOut(name, features=tuple(part), generated=False) for part in parts)


def _check_room(
    patched: Sequence[Sequence[int]], generations: Generations, all_features: bool
) -> None:
    most = min(MAX_EDITS, generations.engine.slot_load.capacity)
    for index, features in enumerate(patched):
        if len(features) > most:
            number = index - all_features
            raise InvalidRequest(
                f"result {index} would patch {len(features)} features; at most {most} together",
                field="all_features" if number < 0 else f"sets[{number}].features",
            )


def _likeliest(distribution: NDArray[np.float32], listed: int, asked: Sequence[int]) -> _Likeliest:
    largest = np.argpartition(-distribution, listed - 1)[:listed]
    ids = largest[np.argsort(-distribution[largest], kind="stable")].tolist()
    return _Likeliest(ids, distribution[ids].tolist(), distribution[list(asked)].tolist())


def _read_pairs(
    messages: Sequence[steering_pb2.PositionPair], source_length: int, target_length: int
) -> dict[int, int]:
    """Source positions by target position."""
    if not messages:
        if source_length != target_length:
            raise InvalidRequest(
                f"required: the source has {source_length} tokens, the target {target_length}",
                field="positions",
            )
        return {position: position for position in range(1, target_length)}
    found: dict[int, int] = {}
    for index, pair in enumerate(messages):
        where = f"positions[{index}]"
        target = _position(pair.target, target_length, f"{where}.target")
        if target in found:
            raise InvalidRequest(f"position {target} comes twice", field=f"{where}.target")
        found[target] = _position(pair.source, source_length, f"{where}.source")
    return found


def _position(position: int, length: int, path: str) -> int:
    if not -length <= position < length:
        raise PositionOutOfRange(
            f"position {position} is not in {-length}..{length - 1}", field=path
        )
    return position % length


def _read_sets(request: steering_pb2.PatchRequest, stored: StoredDictionary) -> list[list[int]]:
    least = 0 if request.all_features else 1
    if not least <= len(request.sets) <= MAX_SETS:
        raise InvalidRequest(f"{len(request.sets)} sets; {least} to {MAX_SETS}", field="sets")
    for number, chosen in enumerate(request.sets):
        where = f"sets[{number}].features"
        if len(chosen.features) > MAX_EDITS:
            raise InvalidRequest(
                f"{len(chosen.features)} features; at most {MAX_EDITS}", field=where
            )
        for index, feature in enumerate(chosen.features):
            check_feature(feature, stored, f"{where}[{index}]")
        if len(set(chosen.features)) < len(chosen.features):
            raise InvalidRequest("names a feature twice", field=where)
    return [list(chosen.features) for chosen in request.sets]


def _read_listed(request: steering_pb2.PatchRequest) -> int:
    if len(request.token_ids) > MAX_TOKENS:
        raise InvalidRequest(
            f"{len(request.token_ids)} tokens; at most {MAX_TOKENS}", field="token_ids"
        )
    listed = request.top_k if request.HasField("top_k") else DEFAULT_LISTED
    if not 1 <= listed <= MAX_LISTED:
        raise InvalidRequest(f"{listed} is not in 1..{MAX_LISTED}", field="top_k")
    return listed
