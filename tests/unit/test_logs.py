"""vLLM is told to log as the server does, while it starts."""

import json
import os
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


def test_text_is_left_to_vllm() -> None:
    with logs.shared_with_vllm("text"):
        assert CONFIG not in os.environ


def test_the_operators_own_configuration_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG, "mine.json")

    with logs.shared_with_vllm("json"):
        assert os.environ[CONFIG] == "mine.json"

    assert os.environ[CONFIG] == "mine.json"
