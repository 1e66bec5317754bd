"""`steer-server`: a model with its dictionaries, served until a signal."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvloop

from steer_server import __version__, logs
from steer_server.api.admin import Operations
from steer_server.api.auth import TokenFile, new_token
from steer_server.api.generations import Generations
from steer_server.api.interceptor import Policy
from steer_server.api.presets import Presets
from steer_server.api.server import Server, address
from steer_server.api.session import SessionLimits
from steer_server.api.tls import tls_files
from steer_server.api.wire import Served, read_preset
from steer_server.config import ServerConfig, resolve
from steer_server.errors import EngineUnavailable, InvalidConfig, SteerError
from steer_server.flags import parser, token_parser
from steer_server.generation import Engine
from steer_server.metrics import Metrics
from steer_server.registry import Registry

_log = logging.getLogger(__name__)
_ENGINE_CHECK_SECONDS = 0.5


def main() -> None:
    if sys.argv[1:2] == ["token"]:
        make_token(sys.argv[2:])
        return
    flags = vars(parser().parse_args())
    try:
        config = resolve(flags)
        if flags.get("check_config"):
            check(config)
            print(config.to_toml(), end="")
            return
        logs.set_up(config.log_format)
        # Until the server drains on it: without a handler vLLM's processes would outlive this one.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        uvloop.run(serve(config))
    except SteerError as error:
        where = f"{error.field}: " if error.field else ""
        sys.exit(f"steer-server: {where}{error}")


def check(config: ServerConfig) -> None:
    """All that `serve` checks before it starts the engine: files, dictionaries, watched features."""
    if config.model.startswith(("/", ".")) and not Path(config.model, "config.json").is_file():
        raise InvalidConfig(
            f"{config.model} has no config.json; is it a Hugging Face folder?", field="model"
        )
    tls_files(config.tls_cert, config.tls_key, config.tls_client_ca)
    policy_of(config)
    resolve_watch(config.watch, load_registry(config))


def make_token(arguments: Sequence[str]) -> None:
    """`steer-server token`."""
    options = token_parser().parse_args(arguments)
    try:
        token, entry = new_token(options.name, options.scopes)
    except InvalidConfig as error:
        sys.exit(f"steer-server token: {error}")
    print(f"token of {options.name}, shown this once: {token}", file=sys.stderr)
    print(entry)


async def start_engine(config: ServerConfig, registry: Registry) -> Engine:
    """vLLM with the model, the dictionaries resident, and proof that edits reach its output."""
    with logs.shared_with_vllm(config.log_format):
        # Late: importing vLLM takes seconds, and --help and a wrong key should not.
        from steer_server.engine import EngineSettings, VllmEngine

        sites = config.sites or tuple(sorted({stored.card.site for _, stored in registry}))
        settings = EngineSettings(
            model=config.model,
            sites=sites,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            edit_slots=config.edit_slots,
            dtype=config.dtype,
            enforce_eager=config.enforce_eager,
            kv_cache_gib=config.kv_cache_gib,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
        )
        engine = await VllmEngine.start(settings)
    try:
        for name, stored in registry:
            await engine.add_dictionary(name, stored)
        await engine.self_test()
    except BaseException:
        await engine.shutdown()
        raise
    return engine


async def serve(
    config: ServerConfig,
    start: Callable[[ServerConfig, Registry], Awaitable[Engine]] = start_engine,
) -> None:
    """Startup, wait, shutdown. EngineUnavailable if the engine dies."""
    tls = tls_files(config.tls_cert, config.tls_key, config.tls_client_ca)
    policy = policy_of(config)
    registry = load_registry(config)
    watch = resolve_watch(config.watch, registry)
    presets = Presets.load(config.presets) if config.presets else Presets()
    metrics = Metrics(config.model, registry, watch)
    server = Server(metrics, policy)
    port = server.bind(config.host, config.port, tls)
    try:
        scraped = metrics.serve(config.metrics_host, config.metrics_port)
    except OSError as error:
        raise InvalidConfig(f"cannot listen on it: {error}", field="metrics_port") from error
    if config.auth_tokens and not (tls or config.local):
        _log.warning(
            "without tls_cert and tls_key, tokens travel in the clear; is a proxy in front?"
        )
    engine = await start(config, registry)
    try:
        metrics.watch_engine(engine)
        generations = Generations(engine, registry, metrics, watch, presets)
        check_presets(generations.served)
        await server.start(
            generations,
            Operations(config.dictionary_root, config.drain_seconds),
            SessionLimits(config.session_idle_seconds, config.session_max_seconds),
        )
        with _heap_at_rest():
            await server.open()
            here = address(config.host, port)
            there = address(config.metrics_host, scraped.server_port)
            serving = f"steer {__version__} serving {config.model}"
            _log.info("%s on %s, metrics on %s/metrics", serving, here, there)
            await _until_signal(server, engine, config.drain_seconds)
    finally:
        await server.stop()
        await engine.shutdown()
        scraped.shutdown()
        scraped.server_close()


def policy_of(config: ServerConfig) -> Policy:
    """Who may call; InvalidConfig if the file of tokens is wrong."""
    return Policy(
        max_sessions=config.max_sessions,
        max_sessions_per_principal=config.max_sessions_per_principal,
        slow_reader_seconds=config.slow_reader_seconds,
        tokens=TokenFile(config.auth_tokens) if config.auth_tokens else None,
    )


def check_presets(served: Served) -> None:
    """InvalidConfig if a request could not use one."""
    for name, preset in served.presets:
        try:
            read_preset(preset.edits, served)
        except SteerError as error:
            raise InvalidConfig(f"{error.field}: {error}", field=f"presets.{name}") from error


def load_registry(config: ServerConfig) -> Registry:
    """The dictionaries of the configuration, loaded and checked."""
    registry = Registry()
    for source in config.dictionaries:
        registry.load(source.folder, source.name)
    return registry


def resolve_watch(
    watch: Sequence[tuple[str, int]], registry: Registry
) -> Mapping[str, Sequence[int]]:
    """The watched features by dictionary; InvalidConfig if there is no such one."""
    found: dict[str, list[int]] = {}
    for name, feature in watch:
        try:
            n_features = registry.get(name).card.n_features
        except SteerError as error:
            raise InvalidConfig(str(error), field="watch") from error
        if feature >= n_features:
            raise InvalidConfig(
                f"feature {feature} of {name!r} is not in 0..{n_features - 1}", field="watch"
            )
        found.setdefault(name, []).append(feature)
    return found


@contextmanager
def _heap_at_rest() -> Iterator[None]:
    """What start-up made stays; searched by each of Python's full collections, it would hold up every stream."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _until_signal(server: Server, engine: Engine, drain_seconds: float) -> None:
    """Returns when the server has drained after a signal or a Drain call, at once after a signal more."""
    signals = asyncio.Queue[None]()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, None)
    first: asyncio.Future[None] = asyncio.ensure_future(signals.get())
    called = asyncio.ensure_future(server.draining.wait())
    tasks: set[asyncio.Future] = {first, called}
    try:
        while not first.done() and not called.done():
            if not engine.alive:
                await server.fail()
                raise EngineUnavailable("the engine has died; its log says why")
            await _one_of(tasks, _ENGINE_CHECK_SECONDS)
        _log.info("draining, %s s at most; a second signal stops at once", drain_seconds)
        drained = asyncio.ensure_future(server.drain(drain_seconds))
        hurried = asyncio.ensure_future(_second(signals, first))
        tasks |= {drained, hurried}
        await _one_of({drained, hurried})
    finally:
        for task in tasks:
            task.cancel()


async def _one_of(tasks: set[asyncio.Future], seconds: float | None = None) -> None:
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


async def _second(signals: asyncio.Queue[None], first: asyncio.Future[None]) -> None:
    """Returns with the second signal: whoever drains by a call may stop the process by a signal as well."""
    await first
    await signals.get()


if __name__ == "__main__":
    main()
