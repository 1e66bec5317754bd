"""Named sets of edits, from the operator's file."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from steer.v1 import edits_pb2

from steer_server.api.edits import MAX_EDITS
from steer_server.errors import InvalidConfig, PresetNotFound
from steer_server.registry import NAME


@dataclass(frozen=True)
class Preset:
    """Edits as their author wrote them."""

    description: str
    edits: tuple[edits_pb2.Edit, ...]


class Presets:
    """By name.

    The file is TOML: a table for each preset, with `edits`, each as steer.v1.Edit in proto's JSON form, and a
    `description` if one likes:

        [gardens]
        description = "Everything is about plants."
        edits = [{dictionary = "l10", feature = 1583, clamp = {value = 2, unit = "UNIT_MAX_ACTIVATION_MULTIPLE"}}]
    """

    def __init__(self, entries: dict[str, Preset] | None = None) -> None:
        self._entries = entries or {}

    @classmethod
    def load(cls, file: Path) -> "Presets":
        """InvalidConfig says what is wrong with the file; what its edits name is checked with the dictionaries."""
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidConfig(f"{file} cannot be read: {error}", field="presets") from error
        return cls({name: _preset(name, table) for name, table in tables.items()})

    def get(self, name: str, *, field: str) -> Preset:
        """The preset; PresetNotFound lists those there are."""
        if name not in self._entries:
            there = ", ".join(sorted(self._entries)) or "none"
            raise PresetNotFound(
                f"no preset {name[:64]!r}; there are: {there}", name=name[:64], field=field
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[tuple[str, Preset]]:
        """Ordered by name."""
        return iter(sorted(self._entries.items()))


def _preset(name: str, table: Any) -> Preset:
    if not NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name!r} cannot name a preset: 1 to 64 of a-z, 0-9, dot, dash and underscore, the "
            "first a letter or digit",
            field="presets",
        )
    if not isinstance(table, dict) or not set(table) <= {"description", "edits"}:
        raise InvalidConfig(
            f"{name!r} is not a table of edits and description", field=f"presets.{name}"
        )
    description, entries = table.get("description", ""), table.get("edits", [])
    if not isinstance(description, str) or not isinstance(entries, list):
        raise InvalidConfig("description is a text, edits a list", field=f"presets.{name}")
    if not 1 <= len(entries) <= MAX_EDITS:
        raise InvalidConfig(f"{len(entries)} edits; 1 to {MAX_EDITS}", field=f"presets.{name}")
    edits = []
    for index, entry in enumerate(entries):
        try:
            edits.append(ParseDict(entry, edits_pb2.Edit()))
        except (ParseError, TypeError, AttributeError) as error:
            raise InvalidConfig(str(error), field=f"presets.{name}.edits[{index}]") from error
    return Preset(description, tuple(edits))
