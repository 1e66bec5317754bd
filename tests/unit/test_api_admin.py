"""Dictionaries that come and go, the watch list, sessions and draining, over the wire."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from prometheus_client import generate_latest
from steer.v1 import activations_pb2, admin_pb2, dictionaries_pb2, steering_pb2

from steer_client import CallFailed, ablate, active, read_top
from steer_server import memory
from steer_server.api.admin import Operations
from steer_server.api.session import SessionLimits
from steer_server.api.wire import read_encode
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import load, save
from steer_server.dictionary.site import Site
from steer_server.errors import DictionaryMismatch, OutOfMemory
from steer_server.memory import available_bytes, check_fits
from tests.unit.serving import (
    D_MODEL,
    NAME,
    Serving,
    card_for,
    collect,
    serving,
    small_dictionary,
)

Code = grpc.StatusCode
INVALID, MISSING, STATE, TAKEN = (
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.ALREADY_EXISTS,
)


def make(folder: Path, name: str = "second", seed: int = 2, **card) -> Path:
    """A dictionary of 16 features in `folder`."""
    rows = torch.randn(16, D_MODEL, generator=torch.Generator().manual_seed(seed))
    dictionary = Dictionary.tied(torch.nn.functional.normalize(rows, dim=1), torch.zeros(16))
    made = replace(card_for(dictionary, name), **card)
    save(folder, made, dictionary, FeatureStatistics.zeros(16))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    make(root / "Second.v1")
    make(root / "other-weights", seed=3)
    make(root / "bad-name", name="Not A Name")
    make(root / "inner", site=Site.parse("mlp_act.1"))
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    broken = make(root / "broken")
    weights = (broken / "weights.safetensors").read_bytes()
    (broken / "weights.safetensors").write_bytes(weights[:-1] + b"x")
    outside = make(tmp_path_factory.mktemp("outside") / "d")
    (root / "link").symlink_to(outside)
    (root / "inside").symlink_to(root / "Second.v1")
    linked = make(root / "linked-file")
    (linked / "weights.safetensors").unlink()
    (linked / "weights.safetensors").symlink_to(outside / "weights.safetensors")
    return root


@asynccontextmanager
async def loading(root: Path | None, **options) -> AsyncIterator[Serving]:
    async with serving(operations=Operations(root, drain_seconds=7), **options) as service:
        yield service


@pytest.fixture(scope="module")
async def running(root: Path):
    async with loading(root) as service:
        yield service


async def fails(call) -> CallFailed:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return CallFailed.from_rpc(caught.value)


def loads(service: Serving, folder: str, name: str = ""):
    return service.admin.LoadDictionary(admin_pb2.LoadDictionaryRequest(folder=folder, name=name))


def unloads(service: Serving, name: str, wait: bool = False, timeout: float | None = None):
    request = admin_pb2.UnloadDictionaryRequest(name=name, wait=wait)
    return service.admin.UnloadDictionary(request, timeout=timeout)


def watches(service: Serving, *entries: tuple[str, int]):
    listed = [admin_pb2.WatchEntry(dictionary=name, feature=feature) for name, feature in entries]
    return service.admin.SetWatchList(admin_pb2.SetWatchListRequest(features=listed))


def request(**fields) -> steering_pb2.GenerateStreamRequest:
    generation = steering_pb2.Generation(prompt={"text": "hello"}, **fields)
    return steering_pb2.GenerateStreamRequest(generation=generation)


async def remaining(call) -> list:
    found = []
    while (response := await call.read()) is not grpc.aio.EOF:
        found.append(response)
    return found


async def names(service: Serving) -> list[str]:
    wanted = dictionaries_pb2.ListDictionariesRequest()
    answer = await service.dictionaries.ListDictionaries(wanted)
    return [entry.name for entry in answer.dictionaries]


def series(service: Serving, dictionary: str) -> set[str]:
    """The lines of a scrape that name the dictionary."""
    text = generate_latest(service.metrics.registry).decode()
    return {line for line in text.splitlines() if f'dictionary="{dictionary}"' in line}


async def test_a_loaded_dictionary_is_served_and_gone_when_unloaded(root: Path):
    async with loading(root) as service:
        answer = await loads(service, "Second.v1")
        listed = await names(service)
        edits = [ablate(("second", 3)), ablate((NAME, 3))]
        read_outs = [read_top("second", 2)]
        responses = await collect(
            service.steering.GenerateStream(request(edits=edits, read_outs=read_outs))
        )
        begun = series(service, "second")
        await unloads(service, "second")

        with pytest.raises(CallFailed) as refused:
            await collect(service.steering.GenerateStream(request(edits=edits)))
        assert listed == ["second", NAME]
        assert answer.dictionary.sha256 == load(root / "Second.v1").sha256
        assert responses[-1].finished.edit_reports[0].tokens_changed > 0
        assert any("steer_dictionary_active_features_count" in line for line in begun)
        assert any("steer_edit_tokens_total" in line for line in begun)
        assert any("steer_encode_seconds_count" in line for line in begun)
        assert (refused.value.code, await names(service)) == (MISSING, [NAME])
        assert series(service, "second") == set()
        assert series(service, NAME)


async def test_a_name_may_come_back_with_other_weights(root: Path):
    async with loading(root) as service:
        hashes = []
        for folder in ("Second.v1", "other-weights"):
            hashes.append((await loads(service, folder, "second")).dictionary.sha256)
            await unloads(service, "second")

        assert len(set(hashes)) == 2


async def test_a_link_that_stays_in_the_root_is_followed(root: Path):
    async with loading(root) as service:
        answer = await loads(service, "inside", "again")

        assert answer.dictionary.name == "again"


LOADS = [
    ("", "", INVALID, "folder"),
    ("..", "", INVALID, "folder"),
    ("a/b", "", INVALID, "folder"),
    ("-x", "", INVALID, "folder"),
    ("x" * 65, "", INVALID, "folder"),
    ("nothing", "", MISSING, "folder"),
    ("file", "", MISSING, "folder"),
    ("link", "", MISSING, "folder"),
    ("linked-file", "", MISSING, "folder"),
    ("empty", "", Code.DATA_LOSS, ""),
    ("broken", "", Code.DATA_LOSS, ""),
    ("inner", "", STATE, ""),
    ("bad-name", "", INVALID, "folder"),
    ("Second.v1", "Upper", INVALID, "name"),
    ("Second.v1", "x" * 65, INVALID, "name"),
    ("Second.v1", NAME, TAKEN, "name"),
]


@pytest.mark.parametrize(("folder", "name", "code", "field"), LOADS)
async def test_what_cannot_be_loaded_is_refused_and_nothing_changes(
    running: Serving, folder: str, name: str, code: Code, field: str
):
    before = await names(running), series(running, NAME)

    error = await fails(loads(running, folder, name))

    assert (error.code, error.field) == (code, field)
    assert (await names(running), series(running, NAME)) == before
    assert "/" not in str(error).replace("a/b", ""), "paths are the operator's"


async def test_a_server_without_a_root_loads_nothing():
    async with loading(None) as service:
        error = await fails(loads(service, "Second.v1"))

    assert (error.code, error.reason) == (STATE, "NOT_CONFIGURED")
    assert "dictionary_root" in str(error)


async def test_a_dictionary_that_the_engine_refuses_leaves_its_name_free(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    async with loading(root) as service:

        async def refuse(name: str, stored: object) -> None:
            raise DictionaryMismatch("of another model")

        monkeypatch.setattr(service.engine, "add_dictionary", refuse)
        error = await fails(loads(service, "Second.v1"))
        monkeypatch.undo()
        await loads(service, "Second.v1")

        assert error.code is STATE
        assert await names(service) == ["second", NAME]


async def test_a_name_on_its_way_in_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch):
    async with loading(root) as service:
        gate = asyncio.Event()
        monkeypatch.setattr(service.engine, "add_dictionary", lambda *_: gate.wait())
        first = loads(service, "Second.v1")
        await asyncio.sleep(0.05)
        second = await fails(loads(service, "other-weights"))
        listed = await names(service)
        gate.set()
        await first

        assert second.code is TAKEN
        assert listed == [NAME]
        assert await names(service) == ["second", NAME]


def test_a_dictionary_that_does_not_fit_memory_is_refused_with_both_numbers(root: Path):
    folder = root / "Second.v1"
    card = load(folder).card
    size = (folder / "weights.safetensors").stat().st_size
    encoder = 4 * card.d_model * card.n_features

    check_fits(folder, card, available=2 * size + 2 * encoder)
    with pytest.raises(OutOfMemory, match="0 MiB of memory, 0 MiB are free"):
        check_fits(folder, card, available=2 * size + 2 * encoder - 1)
    halves = replace(card, dtype="bfloat16")
    check_fits(folder, halves, available=4 * size + 2 * encoder)
    with pytest.raises(OutOfMemory):
        check_fits(folder, halves, available=4 * size + 2 * encoder - 1)
    check_fits(folder, card, workers=3, available=4 * size + 6 * encoder)
    with pytest.raises(OutOfMemory):
        check_fits(folder, card, workers=3, available=4 * size + 6 * encoder - 1)


def test_free_memory_is_what_the_kernel_says_or_the_control_group_if_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:    64 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    host = available_bytes()
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 5000\n")
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = available_bytes()
    (tmp_path / "memory.max").write_text("40000\n")

    assert host == unlimited == 64 * 1024
    assert available_bytes() == 15_000


async def test_loading_more_than_fits_is_an_error_of_the_call(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    async with loading(root) as service:
        monkeypatch.setattr(memory, "available_bytes", lambda: 10)
        error = await fails(loads(service, "Second.v1"))

        assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
        assert error.retry_seconds is None
        assert await names(service) == [NAME]


CONDITION = ablate((NAME, 2), when=active(("second", 1)))


@pytest.mark.parametrize(
    "fields",
    [
        {"edits": [ablate(("second", 3))]},
        {"edits": [CONDITION]},
        {"read_outs": [read_top("second", 1)]},
    ],
    ids=["edit", "condition", "read-out"],
)
async def test_a_dictionary_that_a_running_request_names_stays(root: Path, fields: dict):
    async with loading(root) as service:
        await loads(service, "Second.v1")
        service.engine.steps = asyncio.Semaphore(1)
        call = service.steering.GenerateStream(request(**fields))
        await call.read()
        await call.read()
        error = await fails(unloads(service, "second"))
        still = await names(service)
        call.cancel()
        async with asyncio.timeout(5):
            while service.engine.running:
                await asyncio.sleep(0.005)
        await unloads(service, "second")

        assert (error.code, error.reason, error.field) == (STATE, "DICTIONARY_IN_USE", "name")
        assert "1 running requests" in str(error)
        assert still == ["second", NAME]


async def test_unloading_may_wait_for_the_requests_that_run(root: Path):
    async with loading(root) as service:
        await loads(service, "Second.v1")
        service.engine.steps = asyncio.Semaphore(1)
        call = service.steering.GenerateStream(
            request(edits=[ablate(("second", 3))], sampling={"max_tokens": 2})
        )
        await call.read()
        await call.read()
        leaving = asyncio.ensure_future(_done(unloads(service, "second", wait=True)))
        await asyncio.sleep(0.05)
        refused = await fails(loads(service, "other-weights", "second"))
        listed, waiting = await names(service), not leaving.done()
        service.engine.steps.release()
        rest = await remaining(call)
        await asyncio.wait_for(leaving, 5)

        assert (refused.code, listed, waiting) == (TAKEN, [NAME], True)
        assert rest[-1].HasField("finished")
        assert "second" not in service.engine._dictionaries


async def test_a_wait_that_ends_early_leaves_the_dictionary_as_it_was(root: Path):
    async with loading(root) as service:
        await loads(service, "Second.v1")
        service.engine.steps = asyncio.Semaphore(1)
        call = service.steering.GenerateStream(request(edits=[ablate(("second", 3))]))
        await call.read()
        await call.read()
        error = await fails(unloads(service, "second", wait=True, timeout=0.1))
        async with asyncio.timeout(5):
            while "second" not in await names(service):
                await asyncio.sleep(0.005)
        call.cancel()

        assert error.code is Code.DEADLINE_EXCEEDED


async def turning(service: Serving):
    """A session whose turn has a token, and waits for the next."""
    service.engine.steps = asyncio.Semaphore(1)
    session = service.steering.Session()
    await session.write(start())
    await session.read()
    await session.read()
    return session


async def test_an_update_of_a_session_counts_as_naming(root: Path):
    async with loading(root) as service:
        await loads(service, "Second.v1")
        session = await turning(service)
        update = steering_pb2.UpdateEdits(edits=[ablate(("second", 3))], update_id=1)
        await session.write(steering_pb2.SessionRequest(update=update))
        (state,) = service.engine.running.values()
        async with asyncio.timeout(5):
            while len(state.programs) < 2:
                await asyncio.sleep(0.005)
        error = await fails(unloads(service, "second"))
        session.cancel()

    assert error.reason == "DICTIONARY_IN_USE"


async def test_an_update_that_waits_for_its_turn_counts_as_naming(root: Path):
    slow = SessionLimits(updates_per_second=0.01)
    async with loading(root, limits=slow) as service:
        await loads(service, "Second.v1")
        session = await turning(service)
        for number, name in enumerate((NAME, "second")):
            update = steering_pb2.UpdateEdits(edits=[ablate((name, 3))], update_id=number)
            await session.write(steering_pb2.SessionRequest(update=update))
        (state,) = service.engine.running.values()
        async with asyncio.timeout(5):
            while not service.generations.uses.count("second"):
                await asyncio.sleep(0.005)
        error = await fails(unloads(service, "second"))
        sent = len(state.programs)
        session.cancel()

    assert sent == 2, "the second update was not to be sent yet"
    assert error.reason == "DICTIONARY_IN_USE"


async def test_a_request_whose_dictionary_goes_before_it_runs_is_refused(root: Path):
    async with loading(root) as service:
        await loads(service, "Second.v1")
        wanted = activations_pb2.EncodeRequest(
            prompt={"text": "hi"}, read_outs=[read_top("second", 1)]
        )
        generations = service.generations
        resolved = await read_encode(wanted, generations.engine, generations.registry)
        run = generations.begin("Encode", "r", resolved)
        await unloads(service, "second")
        await loads(service, "other-weights", "second")

        with pytest.raises(Exception, match="was unloaded"):
            await anext(run.outputs())


async def _done(call) -> None:
    await call


async def test_unloading_an_unknown_dictionary_is_refused(running: Serving):
    error = await fails(unloads(running, "other"))

    assert (error.code, error.field) == (MISSING, "name")


async def test_the_watch_list_is_replaced_with_its_series(root: Path):
    async with loading(root, watch={NAME: (3, 5)}) as service:
        previous = (await watches(service, (NAME, 5), (NAME, 7))).previous
        await collect(service.steering.GenerateStream(request()))
        f = small_dictionary().dictionary.encode(torch.cat([x for _, x in service.engine.computed]))
        lines = series(service, NAME)
        after = (await watches(service)).previous

        assert [entry.feature for entry in previous] == [3, 5]
        assert not any('feature="3"' in line for line in lines)
        count = service.metric("steer_feature_activation_count")
        assert count == 0, "none is watched any more"
        expected = {f: int((f_ != 0).sum()) for f, f_ in ((5, f[:, 5]), (7, f[:, 7]))}
        for feature, number in expected.items():
            line = (
                f'steer_feature_activation_count{{dictionary="{NAME}",feature="{feature}"}} '
                f"{float(number)}"
            )
            assert line in lines
        assert [entry.feature for entry in after] == [5, 7]
        assert not any("feature=" in line for line in series(service, NAME))


async def test_a_generation_that_reads_what_is_no_longer_watched_goes_on():
    async with serving({NAME: (3, 5)}) as service:
        service.engine.steps = asyncio.Semaphore(1)
        call = service.steering.GenerateStream(request(sampling={"max_tokens": 4}))
        await call.read()
        await call.read()
        await watches(service, (NAME, 5))
        for _ in range(3):
            service.engine.steps.release()
        rest = await remaining(call)

        assert rest[-1].HasField("finished")
        f = small_dictionary().dictionary.encode(torch.cat([x for _, x in service.engine.computed]))
        assert service.metric("steer_feature_activation_count") == int((f[:, 5] != 0).sum())


async def test_a_dictionary_takes_its_watched_features_with_it(root: Path):
    async with loading(root) as service:
        await loads(service, "Second.v1")
        await watches(service, ("second", 1), (NAME, 3))
        service.engine.steps = asyncio.Semaphore(1)
        call = service.steering.GenerateStream(request())
        await call.read()
        await call.read()
        in_use = await fails(unloads(service, "second"))
        call.cancel()
        await unloads(service, "second", wait=True)
        service.engine.steps = None
        await collect(service.steering.GenerateStream(request()))

        assert in_use.reason == "DICTIONARY_IN_USE"
        assert [entry.feature for entry in (await watches(service)).previous] == [3]
        assert series(service, "second") == set()


def start() -> steering_pb2.SessionRequest:
    return steering_pb2.SessionRequest(start_turn={"generation": request().generation})


async def listed(service: Serving) -> list[admin_pb2.SessionInfo]:
    return list((await service.admin.ListSessions(admin_pb2.ListSessionsRequest())).sessions)


async def test_open_sessions_are_listed_oldest_first_with_what_they_do():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(1)
        busy = service.steering.Session()
        await busy.write(start())
        await busy.read()
        await busy.read()
        await asyncio.sleep(0.05)
        idle = service.steering.Session()
        await idle.wait_for_connection()
        async with asyncio.timeout(5):
            while len(found := await listed(service)) < 2:
                await asyncio.sleep(0.005)
        cancel = steering_pb2.SessionRequest(cancel_turn=steering_pb2.CancelTurn())
        await busy.write(cancel)
        while (await busy.read()).WhichOneof("event") != "turn_finished":
            pass
        later = await listed(service)
        await busy.done_writing()
        idle.cancel()
        async with asyncio.timeout(5):
            while await listed(service):
                await asyncio.sleep(0.005)

    assert [(entry.turns, entry.generating) for entry in found] == [(1, True), (0, False)]
    assert found[0].age_seconds >= 0.05
    assert found[0].idle_seconds <= found[0].age_seconds
    assert found[0].session_id != found[1].session_id
    assert not later[0].generating
    assert later[0].idle_seconds < later[0].age_seconds - 0.04


@pytest.mark.parametrize("turn", [False, True])
async def test_a_closed_session_ends_and_its_turn_with_it(turn: bool):
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(1)
        session = service.steering.Session()
        await session.wait_for_connection()
        if turn:
            await session.write(start())
            await session.read()
            await session.read()
        async with asyncio.timeout(5):
            while not (found := await listed(service)):
                await asyncio.sleep(0.005)
        closing = admin_pb2.CloseSessionRequest(session_id=found[0].session_id)
        await service.admin.CloseSession(closing)
        error = await fails(session.read())
        async with asyncio.timeout(5):
            while service.engine.running or await listed(service):
                await asyncio.sleep(0.005)

    assert (error.code, error.reason) == (Code.ABORTED, "SESSION_CLOSED")
    assert len(service.engine.aborted) == int(turn)


async def test_a_client_that_leaves_as_its_session_is_closed_leaves_no_turn():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(0)
        session = service.steering.Session()
        await session.write(start())
        await session.read()
        (found,) = await listed(service)
        closing = admin_pb2.CloseSessionRequest(session_id=found.session_id)
        await service.admin.CloseSession(closing)
        session.cancel()
        async with asyncio.timeout(5):
            while service.engine.running:
                await asyncio.sleep(0.005)

    assert len(service.engine.aborted) == 1


async def test_closing_an_unknown_session_is_refused(running: Serving):
    error = await fails(
        running.admin.CloseSession(admin_pb2.CloseSessionRequest(session_id="gone"))
    )

    assert (error.code, error.field, error.reason) == (MISSING, "session_id", "SESSION_NOT_FOUND")
    details = [error_details_pb2.ResourceInfo() for _ in error.status.details]
    found = [d for d, any_ in zip(details, error.status.details, strict=True) if any_.Unpack(d)]
    assert [entry.resource_name for entry in found] == ["gone"]


async def test_drain_refuses_new_calls_and_says_what_still_runs(root: Path):
    async with loading(root) as service:
        service.engine.steps = asyncio.Semaphore(1)
        call = service.steering.GenerateStream(request(sampling={"max_tokens": 2}))
        await call.read()
        answer = await service.admin.Drain(admin_pb2.DrainRequest())
        refused = await fails(service.admin.Drain(admin_pb2.DrainRequest()))
        begun = service.server.draining.is_set()
        service.engine.steps.release()
        rest = await remaining(call)

    assert (answer.running_calls, answer.drain_seconds) == (1, 7)
    assert begun
    assert refused.code is Code.UNAVAILABLE
    assert rest[-1].HasField("finished")
