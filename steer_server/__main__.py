"""`steer-server`: a model with its dictionaries, served until a signal."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

import uvloop

from steer_server import __version__
from steer_server.api.admin import Operations
from steer_server.api.generations import Generations
from steer_server.api.server import Server, address
from steer_server.config import ServerConfig, parser, resolve
from steer_server.errors import EngineUnavailable, InvalidConfig, SteerError
from steer_server.generation import Engine
from steer_server.metrics import Metrics
from steer_server.registry import Registry

_ENGINE_CHECK_SECONDS = 0.5


def main() -> None:
    flags = vars(parser().parse_args())
    try:
        config = resolve(flags)
        if flags.get("check_config"):
            print(config.to_toml(), end="")
            return
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        # Until the server drains on it: without a handler vLLM's processes would outlive this one.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        uvloop.run(serve(config))
    except SteerError as error:
        where = f"{error.field}: " if error.field else ""
        sys.exit(f"steer-server: {where}{error}")


async def start_engine(config: ServerConfig, registry: Registry) -> Engine:
    """vLLM with the model, the dictionaries resident, and proof that edits reach its output."""
    # vLLM reads it when it is imported; its INFO would bury what this server says.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
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
    registry = load_registry(config)
    watch = resolve_watch(config.watch, registry)
    metrics = Metrics(config.model, registry, watch)
    server = Server(metrics)
    port = server.bind(config.host, config.port)
    try:
        scraped = metrics.serve(config.metrics_host, config.metrics_port)
    except OSError as error:
        raise InvalidConfig(f"cannot listen on it: {error}", field="metrics_port") from error
    engine = await start(config, registry)
    try:
        metrics.watch_engine(engine)
        await server.start(
            Generations(engine, registry, metrics, watch),
            Operations(config.dictionary_root, config.drain_seconds),
        )
        await server.open()
        print(
            f"steer {__version__} serving {config.model} on {address(config.host, port)}, "
            f"metrics on {address(config.metrics_host, scraped.server_port)}/metrics",
            flush=True,
        )
        await _until_signal(server, engine, config.drain_seconds)
    finally:
        await server.stop()
        await engine.shutdown()
        scraped.shutdown()
        scraped.server_close()


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
        print(f"draining, {drain_seconds} s at most; a second signal stops at once", flush=True)
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
