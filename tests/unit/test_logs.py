"""vLLM is told to log as the server does, while it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer_server import logs

CONFIG = "VLLM_LOGGING_CONFIG_PATH"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.delenv(CONFIG, raising=False)


def test_json_is_asked_for_at_the_operators_level_and_only_inside() -> None:
    with logs.shared_with_vllm("json"):
        path = Path(os.environ[CONFIG])
        config = json.loads(path.read_text())

    assert config["formatters"]["json"] == {"()": "steer_server.logs.JsonFormatter"}
    assert config["loggers"]["vllm"]["level"] == "ERROR"
    assert CONFIG not in os.environ
    assert not path.exists()


def test_warnings_of_python_are_lines_of_the_log_in_every_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with logs.shared_with_vllm("json"):
        config = json.loads(Path(os.environ[CONFIG]).read_text())
    code = f"import logging.config, warnings; logging.config.dictConfig({config!r}); warnings.warn('old')"
    subprocess.run([sys.executable, "-c", code], check=True)

    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["logger"] == "py.warnings"
    assert "old" in json.loads(line)["message"]


def test_text_is_left_to_vllm() -> None:
    with logs.shared_with_vllm("text"):
        assert CONFIG not in os.environ


def test_the_operators_own_configuration_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG, "mine.json")

    with logs.shared_with_vllm("json"):
        assert os.environ[CONFIG] == "mine.json"

    assert os.environ[CONFIG] == "mine.json"
