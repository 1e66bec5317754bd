"""The Python client and the `steer` command against a real server."""

import asyncio
import json
import sys

import grpc
import pytest
from steer.v1 import activations_pb2, edits_pb2, steering_pb2

from steer_client import CallFailed, Feature, SteerClient, ablate, add, clamp, read_top, rows, scale
from steer_client.cli import parser
from tests.unit.serving import NAME, Serving, serving


@pytest.fixture(scope="module")
async def running():
    async with serving() as service:
        yield service


@pytest.fixture
async def client(running: Serving):
    async with SteerClient(running.target, timeout=10) as connected:
        yield connected


async def steer(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "steer_client", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def test_edits_say_what_they_were_told():
    assert ablate((NAME, 3)).WhichOneof("kind") == "ablate"
    assert clamp((NAME, 3), 2, "max").clamp.unit == edits_pb2.UNIT_MAX_ACTIVATION_MULTIPLE
    assert add((NAME, 3), 2, "row").add.unit == edits_pb2.UNIT_DECODER_COEFFICIENT
    assert scale((NAME, 3), 2).scale.factor == 2
    assert not ablate((NAME, 3)).HasField("scope"), "the server's default holds"
    scoped = ablate((NAME, 3), only=["generated"], exclude=[])
    assert list(scoped.scope.phases) == [edits_pb2.PHASE_GENERATED]
    assert scoped.scope.HasField("exclude_positions")


def test_features_are_written_with_a_colon():
    assert Feature.parse("l9:17") == ("l9", 17)
    assert str(Feature("l9", 17)) == "l9:17"
    for wrong in ("l9", ":3", "l9:", "l9:x", "l9:-1"):
        with pytest.raises(ValueError, match="DICTIONARY:FEATURE"):
            Feature.parse(wrong)


def test_rows_unpack_sparse_activations():
    packed = activations_pb2.SparseActivations(
        position=[4, 7], row_splits=[0, 2, 2], feature=[9, 1], value=[2, 0.5], active=[5, 0]
    )

    assert list(rows(packed)) == [(4, [(9, 2.0), (1, 0.5)], 5), (7, [], 0)]


async def test_the_client_generates_encodes_and_looks_things_up(client: SteerClient):
    events = [event async for event in client.generate("hello", max_tokens=2, temperature=0)]
    encoded = [part async for part in client.encode([1, 2], [read_top(NAME, 2)])]

    assert [type(event).__name__ for event in events] == ["Started", "Tokens", "Tokens", "Finished"]
    assert list(encoded[0].tokens.ids) == [1, 2]
    assert [entry.name for entry in await client.dictionaries()] == [NAME]
    assert (await client.feature(Feature(NAME, 3))).label == "names"


async def test_a_failed_call_says_code_reason_and_field(client: SteerClient):
    with pytest.raises(CallFailed, match=r"not in 0\.\.31") as caught:
        await anext(client.generate("hello", edits=[ablate((NAME, 99))]))

    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "UNKNOWN_FEATURE")
    assert error.field == "generation.edits[0].feature"
    assert error.retry_seconds is None


async def test_closing_the_generator_aborts_the_generation():
    async with serving() as service, SteerClient(service.target) as client:
        service.engine.steps = asyncio.Semaphore(1)
        events = client.generate("hello")
        await anext(events)
        await events.aclose()

        async with asyncio.timeout(5):
            while not service.engine.aborted:
                await asyncio.sleep(0.005)

        assert len(service.engine.aborted) == 1


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--ablate", "l9:17", ablate(("l9", 17))),
        ("--clamp", "l9:17=2xmax", clamp(("l9", 17), 2, "max")),
        ("--clamp", "l9:17=-1.5", clamp(("l9", 17), -1.5)),
        ("--add", "l9:17=0.5norm", add(("l9", 17), 0.5, "norm")),
        ("--add", "l9:17=.5e1row", add(("l9", 17), 5, "row")),
        ("--scale", "a:b:17=3", scale(("a:b", 17), 3)),
    ],
)
def test_the_command_reads_edits(flag: str, value: str, expected: edits_pb2.Edit):
    assert parser().parse_args(["generate", "x", flag, value]).edits == [expected]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--ablate", "l9"),
        ("--clamp", "l9:17"),
        ("--clamp", "l9:17=2ymax"),
        ("--clamp", "l9:17=nan"),
        ("--scale", "l9:17=2xmax"),
        ("--add", "l9:17="),
        ("--top", "l9"),
    ],
)
def test_the_command_explains_what_it_cannot_read(flag: str, value: str, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["generate", "x", flag, value])

    assert caught.value.code == 2
    assert flag in capsys.readouterr().err


async def test_the_command_prints_for_people(running: Serving):
    server = ("--server", running.target)
    listed, shown, encoded, generated = await asyncio.gather(
        steer("dictionaries", *server),
        steer("feature", NAME, "3", *server),
        steer("encode", NAME, "hi", "--top", "2", *server),
        steer(
            *("generate", "hello", "--max-tokens", "3", "--add", f"{NAME}:3=1norm", *server),
            *("--temperature", "0", "--top", f"{NAME}=2"),
        ),
    )

    assert [code for code, _, _ in (listed, shown, encoded, generated)] == [0] * 4
    assert listed[1].startswith("small  resid_post.1  32 features of 8  tied_relu  1 labelled")
    assert shown[1].startswith("small:3  names\n")
    assert "raises: ' Mary' +1.5" in shown[1]
    assert [line.split()[:2] for line in encoded[1].splitlines()] == [["0", "'h'"], ["1", "'i'"]]
    assert len(generated[1]) >= 4
    assert [line.split()[0] for line in generated[2].splitlines()[:7]] == list("0123456")
    assert generated[2].splitlines()[5].split()[1] == repr(generated[1][0])
    assert "length: 5 prompt tokens (0 cached), 3 generated" in generated[2]
    assert "small:3 changed 6 of 6 tokens, by 1 |x| on average" in generated[2]


async def test_the_command_prints_json_lines(running: Serving):
    code, out, _ = await steer(
        *("generate", "hello", "--max-tokens", "2", "--json", "--server", running.target)
    )

    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [next(iter(event)) for event in events] == ["started", "tokens", "tokens", "finished"]
    assert events[-1]["finished"]["usage"]["generated_tokens"] == 2


async def test_the_command_exits_by_kind_of_failure(running: Serving):
    server = ("--server", running.target)
    refused, silent, usage = await asyncio.gather(
        steer("feature", NAME, "99", *server),
        steer("dictionaries", "--server", "127.0.0.1:1", "--timeout", "5"),
        steer("feature", NAME, "-5", *server),
    )

    assert (refused[0], refused[1]) == (1, "")
    assert refused[2] == "steer: OUT_OF_RANGE: feature: feature 99 is not in 0..31\n"
    assert silent[0] == 3
    assert "no server answers at 127.0.0.1:1" in silent[2]
    assert usage[0] == 2
    assert "Traceback" not in refused[2] + silent[2] + usage[2]


async def test_a_session_is_ended_by_leaving_it(running: Serving):
    async with SteerClient(running.target) as client, client.session() as session:
        await session.start("hello", max_tokens=2)
        await session.half_close()
        events = [event async for event in session]

    assert isinstance(events[-1], steering_pb2.Finished)


async def test_the_client_searches_page_by_page_and_finds_the_nearest(client: SteerClient):
    found = [match async for match in client.search("NAMES", page_size=1)]
    nearest = await client.nearest(Feature(NAME, 3), top_k=2)

    assert [(match.dictionary, match.index, match.score) for match in found] == [(NAME, 3, 1.0)]
    assert len(nearest) == 2
    assert [entry.label for entry in await client.features(NAME, [4, 3])] == ["", "names"]
    assert (await client.dictionary(NAME)).n_features == 32
    assert (await client.info()).model == "fake"


async def test_the_client_reads_texts_and_tells_them_apart(client: SteerClient):
    seen = await client.inspect(["hello", [1, 2]], NAME, aggregate="max", top_k=3)
    apart = await client.contrast(["hello"], ["quiet"], NAME, aggregate="frequency")

    assert (seen.tokens, len(seen.features)) == (5, 3)
    assert (apart.positive_tokens, apart.negative_tokens) == (4, 4)
    assert apart.positive[0].difference > 0 > apart.negative[0].difference


async def test_the_client_administers(client: SteerClient):
    before = await client.admin.watch([(NAME, 3)])
    updates = client.watch_stats(0.1)
    first = await anext(updates)
    await updates.aclose()
    previous = await client.admin.watch(before)
    with pytest.raises(CallFailed) as refused:
        await client.admin.load("x")
    with pytest.raises(CallFailed) as unknown:
        await client.admin.unload("x", wait=True)

    assert (before, previous) == ([], [(NAME, 3)])
    assert [entry.label for entry in first.features] == ["names"]
    assert refused.value.reason == "NOT_CONFIGURED"
    assert unknown.value.reason == "DICTIONARY_NOT_FOUND"


async def test_the_client_lists_and_closes_sessions_and_drains():
    async with (
        serving() as service,
        SteerClient(service.target) as client,
        client.session() as session,
    ):
        service.engine.steps = asyncio.Semaphore(0)
        await session.start("hello")
        await anext(aiter(session))
        (entry,) = await client.admin.sessions()
        await client.admin.close_session(entry.session_id)
        with pytest.raises(CallFailed) as closed:
            async for _ in session:
                pass
        drained = await client.admin.drain()

    assert entry.generating
    assert closed.value.reason == "SESSION_CLOSED"
    assert drained.running_calls == 0


async def test_the_command_looks_things_up(running: Serving):
    server = ("--server", running.target)
    found, nearest, inspected, contrasted, told, refused = await asyncio.gather(
        steer("search", "names", "--evidence", "--limit", "5", *server),
        steer("nearest", NAME, "3", "--top", "2", *server),
        steer("inspect", NAME, "hello", "quiet", "--by", "max", "--top", "2", *server),
        steer("contrast", NAME, "--positive", "hello", "--negative", "quiet", "--json", *server),
        steer("info", *server),
        steer("load", "x", *server),
    )

    assert [code for code, _, _ in (found, nearest, inspected, contrasted, told)] == [0] * 5
    assert found[1] == " 1.000  small:3  names\n"
    assert len(nearest[1].splitlines()) == 2
    assert len(inspected[1].splitlines()) == 3
    assert inspected[2] == "8 tokens\n"
    assert json.loads(contrasted[1])["positive_tokens"] == "4"
    assert "resid_post.1: 0 of 16 edit slots in use" in told[1]
    assert (refused[0], "dictionary_root" in refused[2]) == (1, True)


async def test_the_command_administers(running: Serving):
    async with serving() as service:
        server = ("--server", service.target)
        session = service.steering.Session()
        await session.wait_for_connection()
        shown = await steer("sessions", *server)
        closed = await steer("sessions", "--close", shown[1].split()[0], *server)
        unloaded = await steer("unload", NAME, *server)
        drained = await steer("drain", *server)
        session.cancel()

    assert "(anyone)  between turns, 0 turns" in shown[1]
    assert [closed, unloaded] == [(0, "", "")] * 2
    assert drained[1] == "draining: 0 calls run, for 30 s at most\n"
