"""Generations and encodings over the wire."""

import asyncio

import grpc
import numpy as np
import pytest
from steer.v1 import activations_pb2, edits_pb2, prompt_pb2, steering_pb2, steering_pb2_grpc

from steer_client import (
    CallFailed,
    ablate,
    active,
    add,
    clamp,
    limit,
    patch,
    read,
    read_above,
    read_top,
    rows,
    scale,
)
from steer_server.api import calls, events
from steer_server.dictionary.edits import AddRelative
from steer_server.generation import ActivationRows, StepOutput
from tests.unit.serving import INPUT_SCALE, NAME, Serving, collect, serving, small_dictionary

PROMPT = "hello"


def request(**fields) -> steering_pb2.GenerateStreamRequest:
    generation = steering_pb2.Generation(**fields)
    if not generation.HasField("prompt"):
        generation.prompt.text = PROMPT
    return steering_pb2.GenerateStreamRequest(generation=generation)


@pytest.fixture(scope="module")
async def running():
    async with serving() as service:
        yield service


async def generate(service: Serving, **fields) -> list[steering_pb2.GenerateStreamResponse]:
    return await collect(service.steering.GenerateStream(request(**fields)))


def ids(responses) -> list[int]:
    return [token for response in responses for token in response.tokens.ids]


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_generation_starts_streams_tokens_and_finishes(running: Serving):
    responses = await generate(running, sampling={"max_tokens": 3})

    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", "tokens", "tokens", "tokens", "finished"]
    assert list(responses[0].started.prompt.pieces) == list(PROMPT)
    assert [response.tokens.first_index for response in responses[1:-1]] == [0, 1, 2]
    finished = responses[-1].finished
    assert finished.reason == steering_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.generated_tokens) == (5, 3)


async def test_max_tokens_is_cut_to_what_the_context_leaves(running: Serving):
    responses = await generate(running, sampling={"max_tokens": 1000})

    assert responses[0].started.max_tokens == 64 - 5
    assert len(ids(responses)) == 64 - 5


async def test_logprobs_come_only_if_asked_for(running: Serving):
    plain = await generate(running, sampling={"max_tokens": 2})
    asked = await generate(running, sampling={"max_tokens": 2, "logprobs": True})

    assert not any(response.tokens.logprobs for response in plain)
    assert [len(response.tokens.logprobs) for response in asked[1:-1]] == [1, 1]


async def test_units_are_resolved_to_activations_and_echoed(running: Serving):
    edits = [
        clamp((NAME, 2), 2, "max"),
        add((NAME, 3), 4, "row"),
        add((NAME, 4), 0.5, "norm"),
        clamp((NAME, 5), 1.5),
        scale((NAME, 6), 3),
        ablate((NAME, 7)),
    ]

    started = (await generate(running, edits=edits))[0].started

    assert started.edits[0].clamp.value == pytest.approx(2 * 3.0)
    assert started.edits[1].add.value == pytest.approx(4 * INPUT_SCALE)
    assert started.edits[2].add == edits_pb2.Add(value=0.5, unit=edits_pb2.UNIT_RELATIVE_NORM)
    assert started.edits[3].clamp.value == 1.5
    assert started.edits[4].scale.factor == 3
    assert started.edits[5].WhichOneof("kind") == "ablate"
    assert started.edits[0].clamp.unit == edits_pb2.UNIT_ACTIVATION
    assert list(started.edits[0].scope.phases) == [1, 2]
    assert list(started.edits[0].scope.exclude_positions.positions) == [0]


async def test_a_decoder_coefficient_moves_x_by_that_multiple_of_the_stored_row(running: Serving):
    edits = [add((NAME, 3), 4, "row")]

    responses = await generate(running, edits=edits, sampling={"max_tokens": 1})

    stored = small_dictionary().dictionary
    value = responses[0].started.edits[0].add.value
    moved = value * stored.rows.decoder[3]
    assert moved.tolist() == pytest.approx((4 * stored.W_dec[3]).tolist())


async def test_an_explicitly_empty_exclusion_reaches_position_0(running: Serving):
    edits = [scale((NAME, 1), 2, exclude=[])]

    responses = await generate(running, edits=edits, sampling={"max_tokens": 1})

    assert not responses[0].started.edits[0].scope.exclude_positions.positions
    assert responses[-1].finished.edit_reports[0].tokens_in_scope == 5


async def test_edits_change_the_output_and_report_what_they_did(running: Serving):
    plain = await generate(running)
    edited = await generate(running, edits=[add((NAME, 2), 3, "norm")])

    assert ids(plain) != ids(edited)
    report = edited[-1].finished.edit_reports[0]
    assert report.tokens_in_scope == report.tokens_changed == 4 + 63 - 5
    assert report.mean_relative_size == pytest.approx(3)


async def test_edits_hold_where_they_are_asked_to(running: Serving):
    """The prompt has positions 0..4, generated tokens that are read 5..7."""
    asked = [
        patch((NAME, 1), {1: 2.0, -1: 3.0}),
        limit((NAME, 2), 1.0, 1.5, windows=[(-3, None)]),
        add((NAME, 3), 1.0, tokens=[ord("l")]),
        add((NAME, 4), 1.0, at=[1, 2, 3], exclude=[2], exclude_tokens=[ord("e")]),
        clamp((NAME, 5), 9.0, when=active()),
    ]
    reads = [read_above(NAME, 0.0), read_above(NAME, 0.0, after_edits=True)]

    responses = await generate(running, edits=asked, read_outs=reads, sampling={"max_tokens": 4})

    reports = responses[-1].finished.edit_reports
    assert [report.tokens_in_scope for report in reports] == [2, 6, 2, 1, 7]
    echoed = responses[0].started.edits
    assert list(echoed[0].patch.positions) == [1, 4]
    assert [(w.first, w.HasField("end")) for w in echoed[1].scope.windows] == [(2, False)]
    assert (echoed[4].when.dictionary, echoed[4].when.feature) == (NAME, 5)
    before, after = ({}, {})
    for part in (part for response in responses for part in response.tokens.activations):
        (after if part.read_out else before).update(
            {row.position: row.features for row in rows(part)}
        )
    assert before[0] == after[0]  # default scopes leave position 0 alone
    assert all(before[position] != after[position] for position in (1, 4))


async def test_read_outs_keep_their_indices_and_hold_the_dictionarys_activations(
    running: Serving,
):
    read_outs = [read(NAME, [5, 3]), read_top(NAME, 4, only=["generated"])]

    responses = await generate(running, read_outs=read_outs, sampling={"max_tokens": 3})

    seen = [part for response in responses for part in response.tokens.activations]
    assert [(part.read_out, list(part.position)) for part in seen] == [
        (0, [0, 1, 2, 3, 4]),
        (0, [5]),
        (1, [5]),
        (0, [6]),
        (1, [6]),
    ]
    x = running.engine.computed[-2][1]
    f = small_dictionary().dictionary.encode(x)[0]
    row = next(rows(seen[2]))
    assert row.active == int((f != 0).sum())
    assert dict(row.features) == pytest.approx({i: float(f[i]) for i, _ in row.features})


async def test_encode_returns_tokens_then_every_row(running: Serving):
    wanted = activations_pb2.EncodeRequest(prompt={"text": PROMPT}, read_outs=[read_top(NAME, 3)])

    responses = await collect(running.activations.Encode(wanted))

    assert list(responses[0].tokens.pieces) == list(PROMPT)
    assert [list(part.position) for part in responses[1].activations] == [[0, 1, 2, 3, 4]]
    assert len(responses) == 2


async def test_encode_computes_rows_that_the_prefix_cache_holds():
    async with serving() as service:
        service.engine.cached_tokens = 4
        wanted = activations_pb2.EncodeRequest(
            prompt={"text": PROMPT}, read_outs=[read_top(NAME, 3)]
        )

        responses = await collect(service.activations.Encode(wanted))

    assert list(responses[1].activations[0].position) == [0, 1, 2, 3, 4]


async def test_token_ids_are_taken_as_they_are(running: Serving):
    responses = await generate(running, prompt={"token_ids": {"ids": [1, 2, 3]}})

    assert list(responses[0].started.prompt.ids) == [1, 2, 3]


async def test_cancelling_the_call_aborts_the_generation():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(2)
        call = service.steering.GenerateStream(request())
        await call.read()
        await call.read()
        assert len(service.engine.running) == 1

        call.cancel()
        await until(lambda: not service.engine.running)

        assert len(service.engine.aborted) == 1
        assert service.metric("steer_requests_total", finish_reason="abort") == 1
        labels = {"grpc_method": "GenerateStream", "grpc_code": "CANCELLED"}
        assert service.metric("grpc_server_handled_total", **labels) == 1


async def test_a_deadline_aborts_the_generation():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(1)
        call = service.steering.GenerateStream(request(), timeout=0.3)
        with pytest.raises(Exception, match="Deadline"):
            await collect(call)

        await until(lambda: service.engine.aborted)

        labels = {"grpc_method": "GenerateStream", "grpc_code": "DEADLINE_EXCEEDED"}
        await until(lambda: service.metric("grpc_server_handled_total", **labels) == 1)


async def test_a_client_that_stops_reading_stops_the_engine_and_can_still_cancel():
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14))
    async with (
        serving() as service,
        grpc.aio.insecure_channel(service.target, options=small_window) as channel,
    ):
        service.engine.max_model_len = 100_000
        wide = request(read_outs=[read(NAME, range(32))] * 8, sampling={"max_tokens": 90_000})
        call = steering_pb2_grpc.SteeringServiceStub(channel).GenerateStream(wide)
        await call.read()
        counts = [0]
        async with asyncio.timeout(5):
            while len(counts) < 5 or counts[-1] != counts[-3]:
                await asyncio.sleep(0.05)
                counts.append(len(service.engine.computed))

        call.cancel()
        await until(lambda: service.engine.aborted)

    assert 0 < counts[-1] < 5000, "the engine stopped, although it had 90,000 tokens to go"


async def test_a_slow_reader_gets_everything_in_merged_messages():
    async with serving() as service:
        expected = ids(await generate(service))
        service.engine.merge = 7

        responses = await generate(service, read_outs=[read(NAME, [5])])

    assert ids(responses) == expected
    positions = [p for r in responses for part in r.tokens.activations for p in part.position]
    assert positions == list(range(63))


def activation_rows(n_rows: int, per_row: int) -> ActivationRows:
    return ActivationRows(
        0,
        NAME,
        np.arange(n_rows, dtype=np.uint32),
        np.arange(n_rows + 1, dtype=np.uint32) * per_row,
        np.arange(n_rows * per_row, dtype=np.uint32),
        np.ones(n_rows * per_row, np.float32),
        np.full(n_rows, 9, np.uint32),
    )


@pytest.mark.parametrize(("n_rows", "per_row"), [(1, 0), (3, 2), (70_000, 0), (5000, 128)])
def test_rows_are_cut_into_messages_that_fit_and_lose_nothing(n_rows: int, per_row: int):
    given = activation_rows(n_rows, per_row)
    output = StepOutput(4, (1,), "x", activations=(given, given))

    made = steering_pb2.GenerateStreamResponse
    messages = [response.tokens for response in events.tokens(made, output)]

    parts = [part for message in messages for part in message.activations]
    assert [p for part in parts for p in part.position] == [*range(n_rows)] * 2
    assert [v for part in parts for v in part.feature] == [*range(n_rows * per_row)] * 2
    assert all(part.row_splits[-1] == len(part.feature) for part in parts)
    assert all(len(part.active) == len(part.position) for part in parts)
    assert max(message.ByteSize() for message in messages) < 2 << 20
    assert [list(message.ids) for message in messages][-1] == [1]
    assert sum(len(message.ids) for message in messages) == 1


async def test_a_relative_addition_is_one_in_the_engine(running: Serving):
    seen = []
    begin = running.engine.generate

    def recording(generation):
        seen.append(generation.program.edits[0].edit)
        return begin(generation)

    running.engine.generate = recording
    try:
        await generate(running, edits=[add((NAME, 2), 0.5, "norm")], sampling={"max_tokens": 1})
    finally:
        del running.engine.generate

    assert seen == [AddRelative(2, 0.5)]


async def test_generate_answers_once_with_all_that_a_stream_would_say(running: Serving):
    fields = {"sampling": {"max_tokens": 4, "logprobs": True}, "read_outs": [read_top(NAME, 3)]}
    streamed = await generate(running, **fields)

    whole = await running.steering.Generate(
        steering_pb2.GenerateRequest(generation=request(**fields).generation)
    )

    (sequence,) = whole.sequences
    tokens = [response.tokens for response in streamed if response.WhichOneof("event") == "tokens"]
    assert list(sequence.tokens.ids) == ids(streamed)
    assert sequence.tokens.text == "".join(part.text for part in tokens)
    assert list(sequence.tokens.logprobs) == [p for part in tokens for p in part.logprobs]
    assert list(sequence.tokens.activations) == [a for part in tokens for a in part.activations]
    assert sequence.finished.usage == streamed[-1].finished.usage
    assert whole.started.sampling == streamed[0].started.sampling


async def test_sequences_are_numbered_and_their_seeds_count_up(running: Serving):
    sampling = {"max_tokens": 2, "n": 3, "seed": 5}
    seeds = []
    begin = running.engine.generate

    def generate_noting(generation):
        seeds.append(generation.sampling.seed)
        return begin(generation)

    running.engine.generate = generate_noting
    try:
        responses = await generate(running, sampling=sampling)
    finally:
        del running.engine.generate

    assert seeds == [5, 6, 7]
    assert responses[0].started.sampling.n == 3
    finished = [r.finished.sequence for r in responses if r.WhichOneof("event") == "finished"]
    assert sorted(finished) == [0, 1, 2]
    for number in range(3):
        mine = [r for r in responses if r.tokens.ids and r.tokens.sequence == number]
        assert len(ids(mine)) == 2


async def test_a_chat_becomes_a_prompt_by_the_models_template(running: Serving):
    chat = prompt_pb2.Chat(
        messages=[
            prompt_pb2.ChatMessage(role=prompt_pb2.ROLE_SYSTEM, content="be"),
            prompt_pb2.ChatMessage(role=prompt_pb2.ROLE_USER, content="hi"),
        ]
    )

    responses = await generate(running, prompt={"chat": chat}, sampling={"max_tokens": 1})

    assert "".join(responses[0].started.prompt.pieces) == "s:be\nu:hi\na:"


async def stops_at(service: Serving, above: float, **fields) -> list:
    stop = edits_pb2.Condition(dictionary=NAME, feature=2, above=above)
    return await generate(service, stop_when=[stop], sampling={"max_tokens": 20}, **fields)


async def test_a_generation_ends_with_the_token_on_which_a_feature_fires(running: Serving):
    plain = await generate(
        running, sampling={"max_tokens": 20}, read_outs=[read(NAME, [2], only=["generated"])]
    )
    values = {
        row.position - len(PROMPT): row.features[0][1]
        for response in plain
        for sparse in response.tokens.activations
        for row in rows(sparse)
        if row.features
    }
    last, largest = max(values.items(), key=lambda entry: entry[1])

    stopped = await stops_at(running, largest * 0.999, edits=[ablate((NAME, 3), only=["prompt"])])

    finished = stopped[-1].finished
    assert finished.reason == steering_pb2.FINISH_REASON_FEATURE
    assert finished.HasField("stopped_by")
    assert ids(stopped) == ids(plain)[: last + 1]
    assert finished.usage.generated_tokens == last + 1
    assert [report.tokens_in_scope for report in finished.edit_reports] == [len(PROMPT) - 1]
    assert (await stops_at(running, largest))[-1].finished.reason == (
        steering_pb2.FINISH_REASON_LENGTH
    )


async def test_what_a_slow_reader_gets_at_once_is_cut_at_the_feature_too(running: Serving):
    stop = edits_pb2.Condition(dictionary=NAME, feature=2)
    running.engine.merge = 6
    try:
        plain = await generate(running, sampling={"max_tokens": 6})
        steered = await generate(
            running,
            stop_when=[stop],
            edits=[clamp((NAME, 2), 5, exclude=[])],
            sampling={"max_tokens": 6},
        )
    finally:
        running.engine.merge = 1
    assert plain[1].tokens.text == "".join(map(chr, ids(plain)))
    kept = ids(steered)
    assert 0 < len(kept) < 6
    assert "".join(r.tokens.text for r in steered) == "".join(map(chr, kept))
    assert steered[-1].finished.usage.generated_tokens == len(kept)


async def test_an_answer_that_grows_too_large_ends_while_it_is_made(
    running: Serving, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calls, "MAX_RESPONSE_BYTES", 400)
    request = steering_pb2.GenerateRequest(
        generation={
            "prompt": {"text": PROMPT},
            "sampling": {"max_tokens": 40},
            "read_outs": [read_top(NAME, 8)],
        }
    )

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.steering.Generate(request, metadata=[("x-request-id", "too-large")])

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "too-large" in running.engine.aborted


async def test_a_program_that_never_finds_its_slots_is_refused_by_its_path(running: Serving):
    edits = [clamp((NAME, feature), 1) for feature in range(17)]

    with pytest.raises(CallFailed) as caught:
        await generate(running, edits=edits)

    assert caught.value.field == "generation.edits"
    assert "17 slots" in str(caught.value)
