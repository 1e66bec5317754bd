"""One server, one Prometheus that scrapes it, and one client's traffic for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_client import SteerClient
from steer_server.dictionary.files import StoredDictionary
from tests.prometheus.processes import (
    Addresses,
    Prometheus,
    await_true,
    fetch,
    running_prometheus,
    running_server,
)
from tests.prometheus.traffic import NAME, WATCHED, Seen, run_round

_SCRAPED_SECONDS = 60


@pytest.fixture(scope="session")
def server(
    model_path: Path, random_dictionary: StoredDictionary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Addresses]:
    flags = ["--model", str(model_path), "--dictionary", f"{NAME}={random_dictionary.folder}"]
    for feature in WATCHED:
        flags += ["--watch", f"{NAME}:{feature}"]
    flags += ["--host", "127.0.0.1", "--port", "0"]
    flags += ["--metrics-host", "127.0.0.1", "--metrics-port", "0"]
    flags += ["--enforce-eager", "--max-model-len", "512", "--kv-cache-gib", "1"]
    with running_server(flags, tmp_path_factory.mktemp("server")) as addresses:
        yield addresses


@pytest.fixture(scope="session")
def scraping(server: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, before any traffic but with a first scrape."""
    folder = tmp_path_factory.mktemp("prometheus")
    with running_prometheus(server.metrics, folder) as prometheus:
        prometheus.await_value('up{job="steer"}', 1, _SCRAPED_SECONDS)
        yield prometheus


@pytest.fixture(scope="session")
def vllm_before(scraping: Prometheus) -> dict[str, float]:
    """vLLM's own counters before the traffic: the server's self-test is in them."""
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    return {name: scraping.value(f"sum({name})") for name in names}


@pytest.fixture(scope="session")
async def seen(server: Addresses, scraping: Prometheus, vllm_before: dict[str, float]) -> Seen:
    """Two rounds of traffic with a scrape between, so that every rate has something to show."""
    seen = Seen()
    async with SteerClient(server.grpc, timeout=120) as client:
        for _ in range(2):
            await run_round(client, seen)
            handled = sum(seen.calls.values())
            expression = 'sum(grpc_server_handled_total{grpc_service=~"steer[.].+"})'
            scraping.await_value(expression, handled, _SCRAPED_SECONDS)
    return seen


@pytest.fixture(scope="session")
def prometheus(scraping: Prometheus, seen: Seen) -> Prometheus:
    """Prometheus, after it has scraped and evaluated all traffic."""
    scrapes = scraping.value('count_over_time(up{job="steer"}[1h])')
    await_true(
        lambda: scraping.value('count_over_time(up{job="steer"}[1h])') >= scrapes + 3,
        _SCRAPED_SECONDS,
        "three scrapes later",
    )
    await_true(
        lambda: bool(scraping.query("steer:feature_firing:ratio_rate5m")),
        _SCRAPED_SECONDS,
        "the recording rules have run",
    )
    return scraping


@pytest.fixture(scope="session")
def exposition(server: Addresses, seen: Seen) -> str:
    """The page that Prometheus scrapes."""
    return fetch(f"http://{server.metrics}/metrics")
