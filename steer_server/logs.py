"""What the server writes to its log, as lines for people or for machines."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOG_FORMATS = ("text", "json")
_VLLM_CONFIG = "VLLM_LOGGING_CONFIG_PATH"


class TextFormatter(logging.Formatter):
    """A line with the record's fields at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={value}" for key, value in fields_of(record).items())
        return super().formatMessage(record) + fields


class JsonFormatter(logging.Formatter):
    """One JSON object in one line, with the record's fields among its keys."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra={"fields": ...}`."""
    return record.__dict__.get("fields", {})


def handler_with_warnings() -> logging.Handler:
    """To stderr. Python's warnings in this process are lines of the log, too, from now on."""
    logging.captureWarnings(True)
    return logging.StreamHandler()


def set_up(log_format: str) -> None:
    """From now on this process's log, Python's warnings included, goes to stderr in that format."""
    handler = handler_with_warnings()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


@contextmanager
def shared_with_vllm(log_format: str) -> Iterator[None]:
    """What of vLLM starts in the block, in this process or another, writes its log in that format.

    Not where the operator has a `VLLM_LOGGING_CONFIG_PATH`, whose place this takes.
    """
    # vLLM reads both variables when it is imported; its INFO would bury what this server says.
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if log_format == "text" or _VLLM_CONFIG in os.environ:
        yield
        return
    formatter = {"()": f"{JsonFormatter.__module__}.{JsonFormatter.__name__}"}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": formatter},
        "handlers": {
            "stderr": {"()": f"{__name__}.{handler_with_warnings.__name__}", "formatter": "json"}
        },
        "loggers": {
            "vllm": {"handlers": ["stderr"], "level": level, "propagate": False},
            "py.warnings": {"handlers": ["stderr"], "propagate": False},
        },
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        os.environ[_VLLM_CONFIG] = file.name
        try:
            yield
        finally:
            del os.environ[_VLLM_CONFIG]
