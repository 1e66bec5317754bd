"""Settings from file, environment and flags; start-up and its failures; the registry."""

import asyncio
import gc
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from steer.v1 import steering_pb2

from steer_client import CallFailed, SteerClient
from steer_server.__main__ import (
    _until_signal,
    check,
    load_registry,
    make_token,
    resolve_watch,
    serve,
)
from steer_server.api.auth import TokenFile
from steer_server.config import DictionarySource, ServerConfig, resolve
from steer_server.dictionary.files import save
from steer_server.dictionary.site import Site
from steer_server.errors import (
    DictionaryMismatch,
    DictionaryNotFound,
    EditNotApplied,
    EngineUnavailable,
    InvalidConfig,
    SteerError,
)
from steer_server.flags import parser
from steer_server.registry import Registry
from tests.unit.fake_engine import FakeEngine
from tests.unit.serving import D_MODEL, NAME, NEVER_FIRED, serving, small_dictionary


def settings(*arguments: str, environ: dict[str, str] | None = None) -> ServerConfig:
    return resolve(vars(parser().parse_args(arguments)), environ or {})


def test_a_model_is_all_that_must_be_said():
    config = settings("--model", "m")

    assert config == ServerConfig(model="m")
    assert (config.port, config.metrics_port, config.host) == (50051, 9464, "127.0.0.1")


def test_every_flag_reaches_its_setting():
    config = settings(
        *("--model", "m", "--dictionary", "a=/x", "--dictionary", "/y", "--site", "mlp_out.3"),
        *("--watch", "a:7", "--host", "::", "--port", "0", "--metrics-host", "::1"),
        *("--tls-cert", "/c", "--tls-key", "/k", "--tls-client-ca", "/a", "--auth-tokens", "/t"),
        *("--insecure", "--max-sessions", "9", "--max-sessions-per-principal", "3"),
        *("--slow-reader-seconds", "5", "--log-format", "json"),
        *("--metrics-port", "1", "--max-model-len", "128", "--max-num-seqs", "2"),
        *("--dtype", "float32", "--enforce-eager", "--kv-cache-gib", "3", "--drain-seconds", "0"),
        *("--dictionary-root", "/tmp", "--gpu-memory-utilization", "0.8"),
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"),
    )

    assert config == ServerConfig(
        model="m",
        dictionaries=(DictionarySource(Path("/x"), "a"), DictionarySource(Path("/y"))),
        dictionary_root=Path("/tmp"),
        sites=(Site("mlp_out", 3),),
        watch=(("a", 7),),
        host="::",
        port=0,
        tls_cert=Path("/c"),
        tls_key=Path("/k"),
        tls_client_ca=Path("/a"),
        auth_tokens=Path("/t"),
        insecure=True,
        max_sessions=9,
        max_sessions_per_principal=3,
        slow_reader_seconds=5,
        log_format="json",
        metrics_host="::1",
        metrics_port=1,
        max_model_len=128,
        max_num_seqs=2,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=3,
        gpu_memory_utilization=0.8,
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        drain_seconds=0,
    )


def test_the_settings_are_written_as_a_file_that_gives_them_again(tmp_path: Path):
    config = settings(
        *("--model", 'a "model"', "--dictionary", "a=/x", "--dictionary", "/y"),
        *("--site", "mlp_out.3", "--watch", "a:7", "--enforce-eager", "--kv-cache-gib", "3"),
        *("--tls-cert", "/c", "--tls-key", "/k"),
        *("--dictionary-root", str(tmp_path), "--gpu-memory-utilization", "0.75"),
    )
    file = tmp_path / "steer.toml"
    file.write_text(config.to_toml())

    assert settings("--config", str(file)) == config


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path):
    file = tmp_path / "steer.toml"
    file.write_text(
        'model = "file"\nport = 1\nmetrics_port = 1\nenforce_eager = true\n'
        'watch = ["a:1"]\n[dictionaries]\na = "/x"\n'
    )
    environ = {"STEER_PORT": "2", "STEER_METRICS_PORT": "2", "STEER_DICTIONARIES": "b=/z,/w"}

    config = settings("--config", str(file), "--metrics-port", "3", environ=environ)

    assert (config.model, config.port, config.metrics_port) == ("file", 2, 3)
    assert config.enforce_eager
    assert config.watch == (("a", 1),)
    assert [source.name for source in config.dictionaries] == ["b", ""]


def test_a_table_of_dictionaries_names_them(tmp_path: Path):
    file = tmp_path / "steer.toml"
    file.write_text('model = "m"\n[dictionaries]\na = "/x"\n')

    config = settings(environ={"STEER_CONFIG": str(file)})

    assert config.dictionaries == (DictionarySource(Path("/x"), "a"),)


@pytest.mark.parametrize(
    ("arguments", "key", "said"),
    [
        ([], "model", "--model"),
        (["--port", "70000"], "port", r"'70000'.*0\.\.65535"),
        (["--port", "x"], "port", "'x'"),
        (["--max-model-len", "1"], "max_model_len", r"2\.\."),
        (["--gpu-memory-utilization", "85"], "gpu_memory_utilization", "'85'.*up to 1"),
        (["--gpu-memory-utilization", "most"], "gpu_memory_utilization", "'most'"),
        (["--dtype", "int4"], "dtype", "'int4'.*bfloat16"),
        (["--site", "nowhere.1"], "sites", "resid_post"),
        (["--site", "mlp_act.3"], "sites", "not expose mlp_act.3; served sites are resid_post"),
        (["--watch", "a"], "watch", "DICTIONARY:FEATURE"),
        (["--watch", "a:1", "--watch", "a:1"], "watch", "twice"),
        ([f"--watch=a:{i}" for i in range(101)], "watch", "101.*100"),
        (["--dictionary", "a="], "dictionaries", "NAME=FOLDER"),
        (["--dictionary", "=x"], "dictionaries", "NAME=FOLDER"),
        (["--dictionary", "a=x", "--dictionary", "a=y"], "dictionaries", "'a' names two"),
        (["--config", "/nowhere"], "config", "/nowhere"),
        (["--log-format", "xml"], "log_format", "'xml'.*json"),
        (["--slow-reader-seconds", "0"], "slow_reader_seconds", r"1\.\."),
        (["--host", "0.0.0.0"], "host", "0.0.0.0 is reached.*auth_tokens.*tls_cert.*--insecure"),
        (["--host", "example.org"], "host", "auth_tokens"),
        (["--host", "0.0.0.0", "--tls-cert", "c", "--tls-key", "k"], "host", "auth_tokens"),
        (["--dictionary-root", "/nowhere"], "dictionary_root", "/nowhere.*not a folder"),
    ],
)
def test_a_wrong_setting_is_named_with_what_came_and_what_may(arguments, key: str, said: str):
    model = [] if key == "model" else ["--model", "m"]

    with pytest.raises(InvalidConfig, match=said) as caught:
        settings(*model, *arguments)

    assert caught.value.field == key


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "0.0.0.0", "--insecure"],
        ["--host", "0.0.0.0", "--auth-tokens", "tokens.toml"],
        ["--host", "::", "--tls-client-ca", "ca.pem"],
        ["--host", "localhost"],
        ["--host", "127.9.9.9"],
        ["--host", "::1"],
    ],
)
def test_other_machines_are_let_in_if_something_says_who_calls_or_if_the_operator_insists(
    arguments: list[str],
):
    assert settings("--model", "m", *arguments).host == arguments[1]


@pytest.mark.parametrize(
    ("line", "key"),
    [("prot = 1", "prot"), ("port = true", "port"), ("watch = 3", "watch"), ("model = 3", "model")],
)
def test_a_wrong_line_of_the_file_is_named(tmp_path: Path, line: str, key: str):
    file = tmp_path / "steer.toml"
    file.write_text(line)

    with pytest.raises(InvalidConfig) as caught:
        settings("--config", str(file), *([] if key == "model" else ["--model", "m"]))

    assert caught.value.field == key


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steer_server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_checks_its_configuration_and_exits():
    folder = f"a={small_dictionary().folder}"
    good = run("--model", "m", "--dictionary", folder, "--watch", "a:1", "--check-config")
    bad = run("--model", "m", "--port", "-1")

    assert (good.returncode, good.stderr) == (0, "")
    assert "port = 50051" in good.stdout
    assert 'watch = ["a:1"]' in good.stdout
    assert bad.returncode == 1
    assert bad.stderr == "steer-server: port: '-1' is not a whole number in 0..65535\n"


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"model": "./nowhere"}, InvalidConfig, "no config.json"),
        ({"tls_cert": Path("c")}, InvalidConfig, "required with tls_cert"),
        ({"auth_tokens": Path("/nowhere")}, InvalidConfig, "/nowhere cannot be read"),
        ({"watch": (("other", 1),)}, InvalidConfig, "other"),
        ({"dictionaries": (DictionarySource(Path("/nowhere")),)}, SteerError, "/nowhere"),
    ],
)
def test_what_is_wrong_is_found_without_an_engine(wrong: dict, error: type, said: str):
    good = ServerConfig("m", (DictionarySource(small_dictionary().folder),), watch=((NAME, 3),))
    check(good)

    with pytest.raises(error, match=said):
        check(replace(good, **wrong))


def test_the_command_makes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_token(["alice", "--scope", "infer"])
    made = capsys.readouterr()
    file = tmp_path / "tokens.toml"
    file.write_text(made.out)

    assert TokenFile(file).find(made.err.split()[-1]).name == "alice"
    with pytest.raises(SystemExit, match="'a b' is not a name"):
        make_token(["a b", "--scope", "infer"])


def test_the_command_refuses_a_folder_that_is_no_dictionary(tmp_path: Path):
    refused = run("--model", "m", "--dictionary", str(tmp_path))

    assert refused.returncode == 1
    assert "not a dictionary folder" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_dictionaries_are_loaded_under_the_name_given_or_their_cards():
    folder = small_dictionary().folder
    sources = (DictionarySource(folder), DictionarySource(folder, "other"))

    registry = load_registry(ServerConfig("m", sources))

    assert registry.names == ["other", NAME]
    assert registry.get("other").sha256 == small_dictionary().sha256


@pytest.mark.parametrize("stream", ["attn_z", "mlp_act"])
def test_a_dictionary_of_a_site_that_vllm_does_not_expose_is_refused(stream: str, tmp_path: Path):
    stored = small_dictionary()
    card = replace(stored.card, site=Site.parse(f"{stream}.3"))
    save(tmp_path / "d", card, stored.dictionary, stored.statistics)

    with pytest.raises(DictionaryMismatch) as caught:
        load_registry(ServerConfig("m", (DictionarySource(tmp_path / "d", "x"),)))

    assert str(caught.value) == (
        f"dictionary '{NAME}' was trained at {stream}.3, which vLLM does not expose; "
        "served sites are resid_post, mlp_out and attn_out of any layer"
    )


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "a" * 65, "a\n"])
def test_a_name_that_is_none_is_refused(name: str):
    with pytest.raises(InvalidConfig, match="cannot name"):
        Registry().add(name, small_dictionary())


def test_an_unknown_dictionary_is_answered_with_those_there_are():
    registry = Registry()
    registry.add("a", small_dictionary())
    with pytest.raises(InvalidConfig, match="two dictionaries"):
        registry.add("a", small_dictionary())

    with pytest.raises(DictionaryNotFound, match="there are: a") as caught:
        registry.get("b", field="x.y")

    assert (caught.value.field, caught.value.name) == ("x.y", "b")


def test_watched_features_must_exist():
    registry = Registry()
    registry.add(NAME, small_dictionary())

    assert resolve_watch(((NAME, 1), (NAME, NEVER_FIRED)), registry) == {NAME: [1, NEVER_FIRED]}
    for wrong in ((NAME, 32), ("other", 0)):
        with pytest.raises(InvalidConfig) as caught:
            resolve_watch((wrong,), registry)
        assert caught.value.field == "watch"


class Lines:
    """What `serve` logs, as it comes."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.INFO)

    async def containing(self, text: str) -> str:
        async with asyncio.timeout(5):
            while True:
                for line in self._caplog.messages:
                    if text in line:
                        return line
                await asyncio.sleep(0.01)


async def start_fake(config: ServerConfig, registry: Registry) -> FakeEngine:
    engine = FakeEngine(D_MODEL)
    for name, stored in registry:
        await engine.add_dictionary(name, stored)
    return engine


async def test_the_server_starts_serves_and_ends_with_a_signal(caplog):
    sources = (DictionarySource(small_dictionary().folder),)
    config = ServerConfig("m", sources, port=0, metrics_port=0, watch=((NAME, 3),))
    running = asyncio.ensure_future(serve(config, start_fake))
    line = await Lines(caplog).containing("serving")
    frozen = gc.get_freeze_count()
    target, metrics = re.findall(r"127\.0\.0\.1:[0-9]+", line)

    async with SteerClient(target) as client:
        events = [event async for event in client.generate("hello", max_tokens=2)]
    page = await asyncio.to_thread(
        lambda: urllib.request.urlopen(f"http://{metrics}/metrics").read()
    )
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 5)
    reset_signals()

    assert len(events) == 4
    assert b'steer_tokens_total{phase="generated",steered="0"} 2.0' in page
    assert line.startswith("steer 0.1.0 serving m on ")
    assert frozen > 10_000, "full collections search what start-up made"
    assert gc.get_freeze_count() == 0
    async with SteerClient(target) as client:
        with pytest.raises(CallFailed):
            await client.dictionaries()


async def test_an_engine_that_does_not_start_ends_the_server():
    async def start(config: ServerConfig, registry: Registry):
        raise EditNotApplied("self-test: an edit did not reach the output")

    with pytest.raises(EditNotApplied):
        await serve(ServerConfig("m", port=0, metrics_port=0), start)


async def test_a_taken_metrics_port_is_an_error_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig("m", port=0, metrics_port=taken.getsockname()[1])

        with pytest.raises(InvalidConfig) as caught:
            await serve(config, start_fake)

    assert caught.value.field == "metrics_port"


async def test_a_signal_drains_and_a_second_one_does_not_wait():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(0)
        session = service.steering.GenerateStream(started())
        await session.read()
        waiting = asyncio.ensure_future(_until_signal(service.server, service.engine, 60))
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert not waiting.done()

        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(waiting, 2)

    reset_signals()


async def test_a_drain_call_ends_the_server(caplog):
    running = asyncio.ensure_future(serve(ServerConfig("m", port=0, metrics_port=0), start_fake))
    line = await Lines(caplog).containing("serving")
    (target, _) = re.findall(r"127\.0\.0\.1:[0-9]+", line)

    async with SteerClient(target) as client:
        answer = await client.admin.drain()
    await asyncio.wait_for(running, 5)
    reset_signals()

    assert (answer.running_calls, answer.drain_seconds) == (0, 30)


async def test_a_drain_call_may_be_followed_by_one_signal_without_hurry():
    async with serving() as service, SteerClient(service.target) as client:
        service.engine.steps = asyncio.Semaphore(0)
        call = service.steering.GenerateStream(started())
        await call.read()
        waiting = asyncio.ensure_future(_until_signal(service.server, service.engine, 60))
        await client.admin.drain()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert not waiting.done()

        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(waiting, 2)

    reset_signals()


async def test_a_dead_engine_ends_the_server():
    async with serving() as service:
        waiting = asyncio.ensure_future(_until_signal(service.server, service.engine, 60))
        await asyncio.sleep(0.05)
        service.engine.alive = False

        with pytest.raises(EngineUnavailable, match="died"):
            await asyncio.wait_for(waiting, 3)

    reset_signals()


def reset_signals() -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)


def started():
    generation = steering_pb2.Generation(prompt={"text": "hello"})
    return steering_pb2.GenerateStreamRequest(generation=generation)
