"""The health check of the container images."""

import subprocess
import sys

import pytest

from tests.prometheus.processes import DEPLOY, Addresses

pytestmark = [pytest.mark.prometheus, pytest.mark.timeout(900)]


def check(target: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEPLOY / "healthcheck.py"), target]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_health_check_tells_a_server_that_admits_calls_from_none(server: Addresses) -> None:
    nobody = check("127.0.0.1:1")

    assert check(server.grpc).returncode == 0
    assert nobody.returncode == 1
    assert nobody.stderr == "127.0.0.1:1: UNAVAILABLE\n"
