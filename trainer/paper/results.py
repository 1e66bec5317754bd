"""Results of an experiment as JSON files, one for each part that takes long: what is there is not computed again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import BadConfig
from trainer.files import write_json


class Results:
    """Of one experiment, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """What `compute` returned for these settings, now or in an earlier run; JSON values only.

        `settings` must hold all that the result depends on, dictionaries by their sha256.
        """
        path = self.folder / f"{name}.json"
        found = _read(path)
        if found is not None and found["settings"] == _as_json(settings):
            return found["result"]
        result = _as_json(compute())
        write_json(path, {"settings": settings, "result": result})
        return result


def key(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for the settings, for names of files."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": found["settings"], "result": found["result"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BadConfig(f"{path} is not a file of results ({error!r}); remove it") from error


def _as_json(value: Any) -> Any:
    """As it comes back from a file: tuples as lists, keys as text."""
    return json.loads(json.dumps(value, allow_nan=False))
