"""Tokens, scopes and quotas, over real calls."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from steer_client import CallFailed, SteerClient, Tls, read_top
from steer_server.api import revocation
from steer_server.api.auth import ANYONE, Principal, Quota, Scope, TokenFile, authorise, new_token
from steer_server.api.interceptor import Policy
from steer_server.api.quotas import Quotas
from steer_server.api.revocation import until_revoked
from steer_server.api.server import SERVICES
from steer_server.api.tls import TlsFiles
from steer_server.errors import InvalidConfig, PermissionDenied, QuotaExceeded, Unauthenticated
from tests.unit.certificates import Authority
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import NAME, Serving, serving

Code = grpc.StatusCode


def entry(name: str, *scopes: str, **limits: int) -> str:
    """Of a file of tokens; the token is the name."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    lines = [f"{key} = {value}" for key, value in limits.items()]
    return "\n".join(
        [
            "[[token]]",
            f'name = "{name}"',
            f'sha256 = "{digest}"',
            f"scopes = {list(scopes)}",
            *lines,
            "",
        ]
    )


EVERYONE = "".join(
    [
        entry("i", "infer"),
        entry("o", "observe"),
        entry("io", "infer", "observe"),
        entry("a", "admin"),
        entry("few", "infer", max_calls=1),
        entry("talk", "infer", max_sessions=1),
        entry("tokens", "infer", tokens_per_minute=10),
    ]
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(EVERYONE)
    return path


@pytest.fixture
async def service(file: Path):
    async with serving(policy=Policy(tokens=TokenFile(file))) as running:
        yield running


async def code_of(call) -> Code:
    """How the call ends."""
    try:
        await call
    except CallFailed as error:
        return error.code
    return Code.OK


async def generate(service: Serving, token: str | None, **fields) -> None:
    async with SteerClient(service.target, token=token, timeout=5) as client:
        async for _ in client.generate("hello", max_tokens=2, **fields):
            pass


async def encode(service: Serving, token: str | None) -> None:
    async with SteerClient(service.target, token=token, timeout=5) as client:
        async for _ in client.encode("hello", [read_top(NAME, 1)]):
            pass


async def dictionaries(service: Serving, token: str | None) -> None:
    async with SteerClient(service.target, token=token, timeout=5) as client:
        await client.dictionaries()


async def administer(service: Serving, token: str | None) -> None:
    async with SteerClient(service.target, token=token, timeout=5) as client:
        await client.admin.sessions()
        await client.admin.watch([])


@pytest.mark.parametrize(
    ("call", "open_to"),
    [
        (generate, {"i", "io"}),
        (encode, {"o", "io"}),
        (dictionaries, {"i", "o", "io"}),
        (administer, {"a"}),
    ],
)
async def test_a_service_is_open_to_its_scopes_only(service: Serving, call: Callable, open_to):
    found = {name: await code_of(call(service, name)) for name in ("i", "o", "io", "a")}

    denied = dict.fromkeys({"i", "o", "io", "a"} - open_to, Code.PERMISSION_DENIED)
    assert found == dict.fromkeys(open_to, Code.OK) | denied


@pytest.mark.parametrize("token", [None, "nobody"])
async def test_without_a_known_token_every_service_is_closed(service: Serving, token: str | None):
    for call in (generate, encode, dictionaries):
        assert await code_of(call(service, token)) is Code.UNAUTHENTICATED


async def test_a_refusal_says_why_and_which_scope_would_do(service: Serving):
    with pytest.raises(CallFailed) as unknown:
        await dictionaries(service, "nobody")
    with pytest.raises(CallFailed, match="needs scope observe; 'i' has infer") as denied:
        await encode(service, "i")

    assert unknown.value.reason == "UNAUTHENTICATED"
    assert "nobody" not in str(unknown.value)
    assert denied.value.reason == "PERMISSION_DENIED"


async def test_reading_activations_of_a_generation_needs_observe_too(service: Serving):
    reads = {"read_outs": [read_top(NAME, 1)]}
    assert await code_of(generate(service, "io", **reads)) is Code.OK
    with pytest.raises(CallFailed) as denied:
        await generate(service, "i", **reads)

    async with SteerClient(service.target, token="i") as client, client.session() as session:
        await session.start("hello", **reads)
        with pytest.raises(CallFailed) as denied_turn:
            await anext(aiter(session))

    assert denied.value.code is denied_turn.value.code is Code.PERMISSION_DENIED
    assert denied.value.field == "generation.read_outs"
    assert denied_turn.value.field == "start_turn.generation.read_outs"


@pytest.mark.parametrize("value", ["Basic io", "Bearer", "bearer ", "io"])
async def test_what_is_not_a_bearer_token_is_refused(service: Serving, value: str):
    stub = service.dictionaries
    request = health_pb2.HealthCheckRequest()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ListDictionaries(request, metadata=(("authorization", value),))

    assert refused.value.code() is Code.UNAUTHENTICATED


async def test_two_tokens_in_one_call_are_refused(service: Serving):
    both = (("authorization", "Bearer io"), ("authorization", "Bearer i"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.dictionaries.ListDictionaries(health_pb2.HealthCheckRequest(), metadata=both)

    assert refused.value.code() is Code.UNAUTHENTICATED


async def test_health_needs_no_token_and_reflection_any(service: Serving):
    health = health_pb2_grpc.HealthStub(service.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICES[0]))
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)

    async def reflect(*metadata: tuple[str, str]):
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        return await stub.ServerReflectionInfo(asked, metadata=metadata).read()

    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await reflect(("authorization", "Bearer a"))).list_services_response.service
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await reflect()
    assert refused.value.code() is Code.UNAUTHENTICATED


def test_every_served_service_names_the_scopes_that_open_it():
    for service in SERVICES:
        authorise(ANYONE, service)
        with pytest.raises(PermissionDenied):
            authorise(Principal("nobody", frozenset()), service)


def test_a_service_that_nobody_thought_of_is_the_administrators():
    both = Principal("both", frozenset({Scope.INFER, Scope.OBSERVE}))

    authorise(Principal("admin", frozenset({Scope.ADMIN})), "steer.v1.NewService")
    with pytest.raises(PermissionDenied, match="needs scope admin"):
        authorise(both, "steer.v1.NewService")


def test_a_changed_file_holds_within_a_second(file: Path):
    clock = Clock()
    tokens = TokenFile(file, clock)
    assert tokens.find("i").name == "i"

    file.write_text(entry("new", "infer"))
    clock.now += 0.9
    assert tokens.find("i").name == "i", "the file was looked at too often"
    clock.now += 0.2

    assert tokens.find("new").name == "new"
    with pytest.raises(Unauthenticated):
        tokens.find("i")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running calls are looked at often."""
    monkeypatch.setattr(revocation, "LOOK_SECONDS", 0.02)


async def streamed(client: SteerClient, engine: FakeEngine) -> None:
    """Two tokens, and then none."""
    engine.steps = asyncio.Semaphore(2)
    async for _ in client.generate("hello"):
        pass


async def answered_once(client: SteerClient, engine: FakeEngine) -> None:
    engine.steps = asyncio.Semaphore(0)
    await client.complete("hello")


async def silent_session(client: SteerClient, engine: FakeEngine) -> None:
    async with client.session() as session:
        async for _ in session:
            pass


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("call", [streamed, answered_once, silent_session])
@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (entry("o", "observe"), "UNAUTHENTICATED"),
        (entry("io", "observe"), "PERMISSION_DENIED"),
        (entry("io", "infer"), "PERMISSION_DENIED"),
    ],
    ids=["token", "the scope that let it in", "another scope"],
)
async def test_a_revoked_token_ends_its_running_calls_whatever_they_wait_for(
    file: Path, call: Callable[[SteerClient, FakeEngine], Awaitable[None]], left: str, reason: str
):
    clock = Clock()
    policy = Policy(tokens=TokenFile(file, clock))
    async with serving(policy=policy) as service, SteerClient(service.target, token="io") as client:
        running = asyncio.ensure_future(call(client, service.engine))
        async with asyncio.timeout(5):
            while not service.server._gate.running:
                await asyncio.sleep(0.01)
        # Some looks find the token as it was.
        await asyncio.sleep(0.1)
        assert not running.done()
        file.write_text(left)
        clock.now += 1.1

        async with asyncio.timeout(5):
            with pytest.raises(CallFailed) as ended:
                await running
            while call is not silent_session and not service.engine.aborted:
                await asyncio.sleep(0.01)

    assert ended.value.reason == reason


@pytest.mark.usefixtures("soon")
async def test_a_token_that_is_revoked_while_it_is_admitted_ends_the_call_too(file: Path):
    clock = Clock()
    tokens = TokenFile(file, clock)
    admitted = tokens.find("i")
    file.write_text(entry("o", "observe"))
    clock.now += 1.1

    with pytest.raises(Unauthenticated), until_revoked(tokens, "i", admitted):
        await asyncio.sleep(2)


@pytest.mark.usefixtures("soon")
async def test_a_changed_file_that_still_has_the_token_ends_nothing(file: Path):
    clock = Clock()
    tokens = TokenFile(file, clock)
    async with (
        serving(policy=Policy(tokens=tokens)) as service,
        SteerClient(service.target, token="i") as client,
    ):
        service.engine.steps = asyncio.Semaphore(1)
        running = client.generate("hello", max_tokens=3)
        await anext(running)
        # The call is looked at several times before the change and after it.
        await asyncio.sleep(0.2)
        file.write_text(entry("i", "infer", "observe"))
        clock.now += 1.1
        await asyncio.sleep(0.2)
        service.engine.steps.release()
        service.engine.steps.release()
        events = [event async for event in running]

    assert tokens.find("i").scopes == {Scope.INFER, Scope.OBSERVE}
    assert len(events) == 4


def test_a_bad_new_file_leaves_the_old_tokens_in_force_and_is_logged_once(
    file: Path, caplog: pytest.LogCaptureFixture
):
    clock = Clock()
    tokens = TokenFile(file, clock)
    for content in ("[[token]]\nname = 3", "not TOML", None):
        caplog.clear()
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        for _ in range(3):
            clock.now += 1.1
            assert tokens.find("i").name == "i"
        assert [record.levelname for record in caplog.records] == ["ERROR"]

    file.write_text(entry("new", "infer"))
    clock.now += 1.1
    assert tokens.find("new").name == "new"


def test_an_emptied_file_revokes_every_token(file: Path):
    clock = Clock()
    tokens = TokenFile(file, clock)
    file.write_text("")
    clock.now += 1.1

    with pytest.raises(Unauthenticated):
        tokens.find("i")


GOOD = entry("a", "infer")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x = 1", "nothing but"),
        ("token = 3", "nothing but"),
        ("token = [3]", r"token\[0\]: is not a table"),
        (GOOD + entry("b", "infer", quota=3), r"token\[1\]: there is no quota"),
        (GOOD + entry("a", "observe"), r"token\[1\]: name 'a' is taken"),
        (GOOD + GOOD.replace('"a"', '"b"'), r"token\[1\]: sha256 is that of 'a'"),
        (entry("a b", "infer"), "name 'a b'"),
        (GOOD.replace("sha256 = ", "sha256 = 3 #"), "64 hexadecimal"),
        (entry("a"), "scopes"),
        (entry("a", "all"), "scopes.*admin, infer, observe"),
        (entry("a", "infer", max_calls=0), "max_calls 0"),
        (entry("a", "infer", tokens_per_minute=-1), "tokens_per_minute -1"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_of_tokens_says_where(tmp_path: Path, content: str | None, said: str):
    file = tmp_path / "tokens.toml"
    if content is not None:
        file.write_text(content)

    with pytest.raises(InvalidConfig, match=said) as caught:
        TokenFile(file)

    assert caught.value.field == "auth_tokens"
    assert str(file) in str(caught.value)


def test_a_new_token_fits_its_entry(tmp_path: Path):
    token, made = new_token("alice", [Scope.INFER, Scope.OBSERVE])
    file = tmp_path / "tokens.toml"
    file.write_text(made)

    found = TokenFile(file).find(token)

    assert found == Principal("alice", frozenset({Scope.INFER, Scope.OBSERVE}))
    assert token not in made
    with pytest.raises(InvalidConfig, match="'a b'"):
        new_token("a b", [Scope.INFER])


def violation(error: CallFailed) -> error_details_pb2.QuotaFailure.Violation:
    for detail in error.status.details:
        failure = error_details_pb2.QuotaFailure()
        if detail.Unpack(failure):
            return failure.violations[0]
    raise AssertionError(f"no QuotaFailure in {error.status}")


async def test_a_principal_has_no_more_calls_than_its_own_quota(service: Serving):
    service.engine.steps = asyncio.Semaphore(0)
    async with SteerClient(service.target, token="few") as client:
        running = client.generate("hello")
        await anext(running)

        with pytest.raises(CallFailed, match="'few' may have 1 calls") as refused:
            await client.dictionaries()
        async with SteerClient(service.target, token="i") as other:
            await other.dictionaries()
        await running.aclose()

    assert (refused.value.code, refused.value.reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert violation(refused.value).subject == "principal:few"
    assert refused.value.retry_seconds == 1
    async with asyncio.timeout(5):
        while await code_of(dictionaries(service, "few")) is not Code.OK:
            await asyncio.sleep(0.01)


async def test_a_principal_has_no_more_sessions_than_its_own_quota_or_the_default():
    quotas = Quotas(max_sessions=4, max_sessions_each=2)
    named, modest = Principal("named"), Principal("modest", quota=Quota(max_sessions=1))

    with quotas.call(modest, session=True), pytest.raises(QuotaExceeded, match="1 sessions"):
        quotas.call(modest, session=True).__enter__()
    with quotas.call(named, session=True), quotas.call(named, session=True):
        with quotas.call(named, session=False):
            pass
        with pytest.raises(QuotaExceeded, match="2 sessions"):
            quotas.call(named, session=True).__enter__()
    with quotas.call(named, session=True):
        pass


async def open_sessions(service: Serving, count: int, token: str | None = None) -> list[Code]:
    """Opens one after another and leaves it open; how each ended, OK where it has not."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    calls, found = [], []
    for _ in range(count):
        calls.append(service.steering.Session(metadata=metadata))
        admitted = await calls[-1].initial_metadata()
        found.append(Code.OK if admitted else await calls[-1].code())
    for call in calls:
        call.cancel()
    return found


async def test_sessions_are_counted_as_such(service: Serving):
    assert await open_sessions(service, 2, "talk") == [Code.OK, Code.RESOURCE_EXHAUSTED]
    assert await code_of(generate(service, "talk")) is Code.OK


async def test_sessions_of_nobody_in_particular_share_the_total():
    async with serving(policy=Policy(max_sessions=3, max_sessions_per_principal=1)) as service:
        codes = await open_sessions(service, 4)

    assert codes == [Code.OK] * 3 + [Code.RESOURCE_EXHAUSTED]


def test_tokens_are_forgiven_by_the_minute_and_a_refusal_says_when():
    clock = Clock()
    quotas = Quotas(1, 1, clock)
    principal = Principal("p", quota=Quota(tokens_per_minute=60))
    quotas.check_tokens(principal)
    quotas.count_tokens(principal, 90)

    with pytest.raises(QuotaExceeded, match="60 tokens a minute") as refused:
        quotas.check_tokens(principal)
    assert refused.value.retry_seconds == pytest.approx(31)

    clock.now += 29.9
    with pytest.raises(QuotaExceeded):
        quotas.check_tokens(principal)
    clock.now += 1.1
    quotas.check_tokens(principal)
    quotas.check_tokens(Principal("other", quota=Quota(tokens_per_minute=60)))


async def test_prompt_and_answer_count_and_the_next_generation_waits(service: Serving):
    first = await code_of(generate(service, "tokens"))
    second = await code_of(generate(service, "tokens"))
    with pytest.raises(CallFailed) as refused:
        await generate(service, "tokens")

    # 5 tokens of "hello" and 2 generated, of 10.
    assert (first, second) == (Code.OK, Code.OK)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert refused.value.retry_seconds == pytest.approx(30, abs=2)
    assert await code_of(dictionaries(service, "tokens")) is Code.OK


async def test_a_turn_of_a_session_counts_and_waits_as_well(service: Serving):
    async with SteerClient(service.target, token="tokens") as client, client.session() as session:
        await session.start("hello", max_tokens=8)
        events = aiter(session)
        async for event in events:
            if event.DESCRIPTOR.name == "Finished":
                break
        await session.start("hello")
        with pytest.raises(CallFailed) as refused:
            await anext(events)

    assert refused.value.reason == "QUOTA_EXCEEDED"


async def test_a_certificate_names_the_principal_where_there_are_no_tokens(tmp_path: Path):
    authority = Authority(tmp_path)
    server, client = authority.issue("server"), authority.issue("alice")
    tls = TlsFiles(server.cert, server.key, authority.cert)
    access = Tls(authority.cert, client.cert, client.key)

    async with (
        serving(tls=tls, policy=Policy(max_sessions_per_principal=1)) as service,
        SteerClient(service.target, tls=access) as connected,
        connected.session() as first,
    ):
        await first.start("hello")
        await anext(aiter(first))
        async with connected.session() as second, asyncio.timeout(5):
            with pytest.raises(CallFailed, match="'alice' may have 1 sessions"):
                await anext(aiter(second))


async def test_no_metric_is_labelled_by_principal(service: Serving):
    await generate(service, "io")

    labels = {
        label
        for family in service.metrics.registry.collect()
        for sample in family.samples
        for label in sample.labels.values()
    }
    assert "io" not in labels
