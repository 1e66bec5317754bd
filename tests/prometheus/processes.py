"""A real steer-server and a real Prometheus on loopback ports, each gone when its `with` ends."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPO = Path(__file__).parents[2]
DEPLOY = REPO / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"

_TARGET = '"server:9464"'
_SERVING = re.compile(r"serving .* on (\S+), metrics on (\S+)/metrics")
_SERVER_SECONDS = 400
_PROMETHEUS_SECONDS = 30
_STOP_SECONDS = 60


class Addresses(NamedTuple):
    grpc: str
    metrics: str


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str) -> Any:
        """The answer's data; AssertionError with Prometheus' own words if it is an error."""
        query = urllib.parse.urlencode(parameters)
        try:
            text = fetch(f"http://{self._address}/api/v1/{path}?{query}")
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        return json.loads(text)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series."""
        result = self.get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float:
        """The value of the only series; 0 if there is none."""
        found = self.query(expression)
        assert len(found) <= 1, f"{expression} has {len(found)} series"
        return found[0][1] if found else 0.0

    def await_value(self, expression: str, expected: float, seconds: float) -> None:
        """Returns when the expression has the value."""
        await_true(
            lambda: self.value(expression) == expected, seconds, f"{expression} == {expected}"
        )


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def await_true(holds: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.5)


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished command, run where the shipped configuration is."""
    command = [_binary("promtool"), *arguments]
    return subprocess.run(command, cwd=RULES.parent, capture_output=True, text=True, timeout=60)


@contextmanager
def running_server(arguments: Sequence[str], folder: Path) -> Iterator[Addresses]:
    """A server that admits calls, started with the shipped configuration and these flags."""
    command = [sys.executable, "-m", "steer_server", "--config", str(DEPLOY / "server.toml")]
    with _running([*command, *arguments], folder / "server.log") as (process, log):
        await_true(
            lambda: _alive(process, log) and _SERVING.search(log.read_text()) is not None,
            _SERVER_SECONDS,
            f"steer-server admits calls; its log is {log}",
        )
        match = _SERVING.search(log.read_text())
        assert match
        yield Addresses(match[1], match[2])


@contextmanager
def running_prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """A ready Prometheus with the shipped configuration, but for the target's address."""
    shutil.copytree(RULES.parent, folder / "config")
    config = folder / "config" / "prometheus.yml"
    text = config.read_text()
    assert text.count(_TARGET) == 1
    config.write_text(text.replace(_TARGET, f'"{target}"'))
    address = f"127.0.0.1:{_free_port()}"
    command = [
        _binary("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with _running(command, folder / "prometheus.log") as (process, log):
        await_true(
            lambda: _alive(process, log) and _answers(f"http://{address}/-/ready"),
            _PROMETHEUS_SECONDS,
            f"Prometheus is ready; its log is {log}",
        )
        yield Prometheus(address)


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _alive(process: subprocess.Popen[bytes], log: Path) -> bool:
    if process.poll() is not None:
        pytest.fail(f"{process.args} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return True


def _answers(url: str) -> bool:
    try:
        fetch(url)
    except OSError:
        return False
    return True


def _binary(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"no {name} on the PATH; install Prometheus: apt-get install prometheus")
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
