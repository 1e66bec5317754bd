"""Sessions: turns, live updates, rejections, cancelling."""

import asyncio

import grpc
import pytest
from steer.v1 import steering_pb2

from steer_client import CallFailed, SteerClient, ablate, add, clamp, read, rejection
from steer_server.api.session import SessionLimits, _covering
from steer_server.api.wire import read_generation
from steer_server.errors import InvalidRequest
from steer_server.generation import RevisionApplied, StepOutput
from tests.unit.serving import NAME, Serving, serving

FIRST, SECOND = [add((NAME, 2), 3, "norm")], [clamp((NAME, 3), 5)]


def kind(event) -> str:
    return type(event).__name__


class Reader:
    """Reads a session's events one by one."""

    def __init__(self, session) -> None:
        self._events = aiter(session)

    async def next(self):
        async with asyncio.timeout(5):
            return await anext(self._events, None)

    async def until(self, wanted: str) -> list:
        """The events up to and with the first of this kind."""
        found = [await self.next()]
        while kind(found[-1]) != wanted:
            assert found[-1] is not None, [kind(event) for event in found]
            found.append(await self.next())
        return found


@pytest.fixture
async def service():
    async with serving() as running:
        running.engine.steps = asyncio.Semaphore(0)
        yield running


@pytest.fixture
async def session(service: Serving):
    async with SteerClient(service.target) as client, client.session() as opened:
        yield opened


def step(service: Serving, count: int = 1) -> None:
    assert service.engine.steps
    for _ in range(count):
        service.engine.steps.release()


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def programs(service: Serving) -> int:
    return sum(len(state.programs) for state in service.engine.running.values())


async def test_an_update_is_answered_before_the_first_token_it_affects(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=6)
    step(service, 2)
    await events.until("Started")
    before = [await events.next(), await events.next()]
    update_id = await session.update(FIRST)
    await until(lambda: programs(service) == 2)
    step(service, 4)

    after = await events.until("Finished")

    assert [token for event in before for token in event.ids]
    assert [kind(event) for event in after] == ["UpdateApplied", *["Tokens"] * 4, "Finished"]
    applied = after[0]
    assert (applied.update_id, applied.revision, applied.first_index) == (update_id, 1, 2)
    assert applied.edits[0].add.value == 3
    assert after[1].first_index == 2
    assert [(r.revision, r.tokens_in_scope) for r in after[-1].edit_reports] == [(1, 4)]


async def test_the_updated_tokens_are_those_of_the_new_edits(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=2, edits=SECOND)
    step(service, 1)
    await events.until("Tokens")
    await session.update([])
    await until(lambda: programs(service) == 2)
    step(service, 1)
    live = (await events.until("Finished"))[-2]

    step(service, 1)
    await session.start([*b"hello", service.engine.computed[-1][1].shape[0]], max_tokens=1)
    await events.until("Finished")

    x = service.engine.computed[1][1]
    plain = (x[-1] @ service.engine._head).argmax()
    assert list(live.ids) == [int(plain)], "an empty update removes all edits"


async def test_of_updates_that_come_too_fast_the_last_counts_and_each_is_answered(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=3)
    step(service)
    await events.until("Tokens")
    sent = [await session.update(edits) for edits in (FIRST, [], SECOND)]
    await until(lambda: programs(service) == 3)
    step(service, 2)

    after = await events.until("Finished")

    applied = [event for event in after if kind(event) == "UpdateApplied"]
    assert [event.update_id for event in applied] == sent
    assert {(event.revision, event.first_index) for event in applied} == {(2, 1)}
    assert all(event.edits[0].clamp.value == 5 for event in applied)
    assert [kind(event) for event in after][:3] == ["UpdateApplied"] * 3
    assert service.metric("steer_live_update_latency_seconds_count") == 3


async def test_an_update_that_outlives_its_turn_is_still_answered(service, session):
    service.engine.replies = asyncio.Semaphore(0)
    events = Reader(session)
    await session.start("hello", max_tokens=2)
    step(service)
    await events.until("Tokens")
    await session.update(FIRST)
    await until(lambda: programs(service) == 2)
    step(service)
    await until(lambda: len(service.engine.computed) == 2)
    service.engine.replies.release()

    after = await events.until("Finished")

    assert [kind(event) for event in after] == ["UpdateApplied", "Tokens", "Finished"]
    assert after[-1].edit_reports[0].tokens_changed == 1
    assert service.metric("steer_edit_tokens_total", op="add") == 1


@pytest.mark.parametrize(
    ("edits", "code", "field", "reason"),
    [
        (
            [ablate((NAME, 99))],
            grpc.StatusCode.OUT_OF_RANGE,
            "update.edits[0].feature",
            "UNKNOWN_FEATURE",
        ),
        (
            [ablate(("other", 1))],
            grpc.StatusCode.NOT_FOUND,
            "update.edits[0].dictionary",
            "DICTIONARY_NOT_FOUND",
        ),
        (
            [clamp((NAME, 1), float("nan"))],
            grpc.StatusCode.INVALID_ARGUMENT,
            "update.edits[0].clamp.value",
            "INVALID_REQUEST",
        ),
    ],
)
async def test_a_bad_update_is_rejected_and_the_turn_goes_on(
    service, session, edits, code, field, reason
):
    events = Reader(session)
    await session.start("hello", max_tokens=2)
    step(service)
    await events.until("Tokens")
    update_id = await session.update(edits)

    rejected = await events.next()
    step(service)
    rest = await events.until("Finished")

    assert rejected.update_id == update_id
    error = rejection(rejected)
    assert (error.code, error.field, error.reason) == (code, field, reason)
    assert [kind(event) for event in rest] == ["Tokens", "Finished"]
    assert service.metric("steer_requests_rejected_total", reason=reason) == 1


async def test_an_update_without_a_turn_is_rejected_and_the_session_goes_on(service, session):
    events = Reader(session)
    await session.update(FIRST)

    rejected = await events.next()
    await session.start("hello", max_tokens=1)
    step(service)
    rest = await events.until("Finished")

    assert rejection(rejected).code is grpc.StatusCode.FAILED_PRECONDITION
    assert [kind(event) for event in rest] == ["Started", "Tokens", "Finished"]


async def test_an_update_that_comes_too_late_for_the_turn_is_rejected(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=5)
    step(service)
    await events.until("Tokens")
    update_id = await session.update(FIRST)
    await until(lambda: programs(service) == 2)
    await session.cancel_turn()

    rejected, finished = await events.next(), await events.next()

    assert (rejected.update_id, rejection(rejected).reason) == (update_id, "WRONG_STATE")
    assert finished.reason == steering_pb2.FINISH_REASON_ABORT
    assert (finished.usage.prompt_tokens, finished.usage.generated_tokens) == (5, 1)


async def test_turns_follow_each_other_and_count_from_0(service, session):
    events = Reader(session)
    names = []
    for _ in range(2):
        await session.start("hello", max_tokens=2, read_outs=[read(NAME, [3])])
        step(service, 2)
        turn = await events.until("Finished")
        names.append(turn[0].request_id)
        assert [event.first_index for event in turn[1:-1]] == [0, 1]

    assert names[0] != names[1]
    assert service.metric("steer_requests_total", rpc="Session") == 2


async def test_cancelling_a_turn_aborts_it_and_leaves_the_session_open(service, session):
    events = Reader(session)
    await session.start("hello")
    step(service)
    await events.until("Tokens")
    await session.cancel_turn()
    finished = await events.next()
    assert len(service.engine.aborted) == 1

    await session.cancel_turn()
    await session.start("hello", max_tokens=1)
    step(service)
    again = await events.until("Finished")

    assert finished.reason == steering_pb2.FINISH_REASON_ABORT
    assert again[-1].reason == steering_pb2.FINISH_REASON_LENGTH


async def test_half_closing_lets_the_turn_end_and_then_ends_the_session(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=3)
    await events.until("Started")
    await session.half_close()
    await asyncio.sleep(0.05)
    step(service, 3)

    rest = await events.until("Finished")

    assert [kind(event) for event in rest] == ["Tokens"] * 3 + ["Finished"]
    assert await events.next() is None


async def fails(events: Reader) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await events.until("Finished")
    return caught.value


async def test_starting_a_turn_while_one_runs_ends_the_session(service, session):
    events = Reader(session)
    await session.start("hello")
    await events.until("Started")
    await session.start("hello")

    error = await fails(events)

    assert (error.code, error.field) == (grpc.StatusCode.FAILED_PRECONDITION, "start_turn")
    await until(lambda: len(service.engine.aborted) == 1)


async def test_a_turn_that_cannot_start_ends_the_session_by_field(session):
    await session.start("hello", edits=[ablate((NAME, 99))])

    error = await fails(Reader(session))

    assert error.code is grpc.StatusCode.OUT_OF_RANGE
    assert error.field == "start_turn.generation.edits[0].feature"


async def test_a_start_without_a_generation_and_an_empty_command_end_the_session(service):
    for request, field in (
        (steering_pb2.SessionRequest(), "command"),
        (steering_pb2.SessionRequest(start_turn={}), "start_turn.generation"),
    ):
        call = service.steering.Session()
        await call.write(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()

        error = CallFailed.from_rpc(caught.value)
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_closing_the_session_aborts_its_turn(service):
    async with SteerClient(service.target) as client:
        async with client.session() as session:
            await session.start("hello")
            step(service)
            await Reader(session).until("Tokens")

        await until(lambda: not service.engine.running)

    assert len(service.engine.aborted) == 1


async def test_commands_get_through_to_an_engine_that_never_waits():
    async with serving() as service:
        service.engine.max_model_len = 100_000
        async with SteerClient(service.target) as client, client.session() as session:
            events = Reader(session)
            await session.start("hello", max_tokens=50_000)
            await events.until("Tokens")
            await session.update(FIRST)
            await events.until("UpdateApplied")
            await session.cancel_turn()
            last = (await events.until("Finished"))[-1]

    assert last.reason == steering_pb2.FINISH_REASON_ABORT


@pytest.mark.parametrize(
    ("revision", "expected"),
    # The first two begin in other chunks of the prompt, and so with the same token.
    [(1, (1, 0, 5)), (2, (2, 0, 6)), (3, (4, 4, 8)), (4, (4, 4, 8)), (5, (5, 6, 10)), (6, None)],
)
def test_an_update_is_covered_by_the_last_of_those_that_began_with_it(revision, expected):
    places = [(0, 5), (0, 6), (4, 8), (4, 8), (6, 10)]
    applied = tuple(RevisionApplied(i + 1, *place) for i, place in enumerate(places))

    covering = _covering(applied, revision)

    assert covering == (RevisionApplied(*expected) if expected else None)


async def test_an_update_may_name_the_token_it_holds_from(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=6)
    step(service)
    await events.until("Tokens")
    update_id = await session.update(FIRST, at_index=4)
    await until(lambda: programs(service) == 2)
    step(service, 5)

    after = await events.until("Finished")

    (applied,) = [event for event in after if kind(event) == "UpdateApplied"]
    assert (applied.update_id, applied.first_index) == (update_id, 4)
    tokens = [event for event in after if kind(event) == "Tokens"]
    assert [(t.first_index, t.revision) for t in tokens] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]


async def test_an_update_past_the_turn_is_rejected_and_the_turn_goes_on(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=2)
    await session.update(FIRST, at_index=2)

    (rejected,) = (await events.until("UpdateRejected"))[-1:]
    assert rejection(rejected).code is grpc.StatusCode.OUT_OF_RANGE
    assert rejection(rejected).field == "update.at_index"
    step(service, 2)
    assert (await events.until("Finished"))[-1].usage.generated_tokens == 2


async def test_read_outs_change_with_an_update_and_stay_without(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=4, read_outs=[read(NAME, [2])])
    step(service)
    await events.until("Tokens")
    for number, read_outs in enumerate([[read(NAME, [5]), read(NAME, [6])], None]):
        await session.update([], read_outs=read_outs)
        await until(lambda number=number: programs(service) == number + 2)
        step(service)
        applied = (await events.until("UpdateApplied"))[-1]
        (tokens,) = await events.until("Tokens")
        asked = [list(entry.features.features) for entry in applied.read_outs]
        assert asked == [[5], [6]]
        assert {entry.read_out for entry in tokens.activations} == {0, 1}


async def test_rows_read_before_an_update_come_before_its_answer(service, session):
    service.engine.merge = 4
    events = Reader(session)
    await session.start("hello", max_tokens=4, read_outs=[read(NAME, [2])])
    await events.until("Started")
    await until(lambda: programs(service) == 1)
    await session.update([], read_outs=[read(NAME, [5])], at_index=2)
    await until(lambda: programs(service) == 2)
    step(service, 4)

    before, applied, after, finished = [await events.next() for _ in range(4)]

    assert [kind(event) for event in (applied, finished)] == ["UpdateApplied", "Finished"]
    assert (applied.first_index, before.revision, after.revision) == (2, 0, 1)
    assert (list(before.ids), len(after.ids)) == ([], 4)
    for tokens, feature, positions in ((before, 2, range(6)), (after, 5, range(6, 8))):
        read_at = [position for part in tokens.activations for position in part.position]
        assert read_at == list(positions)
        assert {named for part in tokens.activations for named in part.feature} <= {feature}


async def test_a_revision_that_is_told_early_is_the_one_of_its_token_when_it_comes():
    async with serving() as service:
        generations = service.generations
        wanted = steering_pb2.Generation(prompt={"text": "hello"})
        request = await read_generation(wanted, generations.served, "generation")
        run = generations.begin("Session", "r", request, live=True)

    early = StepOutput(0, (1,), "", applied=(RevisionApplied(1, 1, 5),))
    revisions = []
    for output in (early, StepOutput(1, (2,), "")):
        run._observe(output)
        revisions.append(run.revision)

    assert revisions == [0, 1]


async def test_the_read_outs_of_an_update_that_was_refused_do_not_stay(service, session):
    update = service.engine.update

    async def refuse(*_):
        raise InvalidRequest("no room", field="edits")

    events = Reader(session)
    await session.start("hello", max_tokens=2, read_outs=[read(NAME, [2])])
    step(service)
    await events.until("Tokens")
    service.engine.update = refuse
    await session.update(FIRST, read_outs=[read(NAME, [5])])
    await events.until("UpdateRejected")
    service.engine.update = update
    await session.update(FIRST)
    await until(lambda: programs(service) == 2)
    step(service)

    (applied,) = await events.until("UpdateApplied")

    assert [list(entry.features.features) for entry in applied.read_outs] == [[2]]


async def test_a_paused_turn_computes_nothing_until_it_is_resumed(service, session):
    events = Reader(session)
    await session.start("hello", max_tokens=3)
    step(service)
    await events.until("Tokens")
    await session.pause()
    await events.until("Paused")
    step(service, 2)
    await asyncio.sleep(0.1)
    computed = len(service.engine.computed)
    await asyncio.sleep(0.1)
    assert len(service.engine.computed) == computed < 3
    await session.pause()
    await session.resume()

    after = await events.until("Finished")

    assert [kind(event) for event in after if kind(event) != "Tokens"] == ["Resumed", "Finished"]
    assert after[-1].usage.generated_tokens == 3


async def test_a_session_that_idles_or_lives_too_long_ends_and_says_so():
    for limits, why in (
        (SessionLimits(idle_seconds=0.1), "neither a command nor a token"),
        (SessionLimits(max_seconds=0.1), "at most"),
    ):
        async with serving(limits=limits) as service, SteerClient(service.target) as client:
            service.engine.steps = asyncio.Semaphore(0)
            async with client.session() as session:
                await session.start("hello")
                with pytest.raises(CallFailed, match=why) as caught:
                    await Reader(session).until("Finished")
            await until(lambda service=service: not service.engine.running)

        assert caught.value.code is grpc.StatusCode.ABORTED
        assert caught.value.reason == "SESSION_EXPIRED"


async def test_a_value_that_the_engine_refuses_is_named_in_the_update(service, session):
    async def refuse(*_):
        raise InvalidRequest("the edits need 20 slots, the engine has 16", field="edits")

    events = Reader(session)
    await session.start("hello", max_tokens=1)
    service.engine.update = refuse
    await session.update(FIRST)

    error = rejection((await events.until("UpdateRejected"))[-1])

    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "update.edits")
    step(service)
    await events.until("Finished")
