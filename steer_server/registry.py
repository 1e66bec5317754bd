"""The resident dictionaries, by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer_server.dictionary.files import StoredDictionary, check_served, load
from steer_server.errors import DictionaryNotFound, InvalidConfig, InvalidRequest, NameTaken

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What a dictionary, and a preset, may be called."""
_ALLOWED = "1 to 64 of a-z, 0-9, dot, dash and underscore, the first a letter or digit"


class Registry:
    """The dictionaries that requests may name."""

    def __init__(self) -> None:
        self._entries: dict[str, StoredDictionary] = {}
        self._moving: set[str] = set()
        """Names of dictionaries on their way in or out."""

    def load(self, folder: Path, name: str = "") -> str:
        """Adds the dictionary in `folder` under `name`, by default its card's, and returns the name."""
        stored = load(folder)
        name = name or stored.card.name
        self.add(name, stored)
        return name

    def add(self, name: str, stored: StoredDictionary) -> None:
        """InvalidConfig if the name is taken or not one, DictionaryMismatch if its site is not served."""
        check_served(stored.card)
        if not NAME.fullmatch(name):
            raise InvalidConfig(
                f"{name!r} cannot name a dictionary: {_ALLOWED}", field="dictionaries"
            )
        if name in self._entries:
            raise InvalidConfig(f"{name!r} names two dictionaries", field="dictionaries")
        self._entries[name] = stored

    @contextmanager
    def adding(self, name: str, *, field: str = "") -> Iterator[None]:
        """Keeps the name for a dictionary that the block adds; InvalidRequest if it is not one, NameTaken."""
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"{name[:64]!r} cannot name a dictionary: {_ALLOWED}", field=field)
        if name in self._entries or name in self._moving:
            raise NameTaken(f"a dictionary {name!r} is resident; choose another name", field=field)
        self._moving.add(name)
        try:
            yield
        finally:
            self._moving.discard(name)

    def withdraw(self, name: str, *, field: str = "") -> StoredDictionary:
        """From now on requests cannot name it; its name stays taken until `remove` or `restore`."""
        stored = self.get(name, field=field)
        del self._entries[name]
        self._moving.add(name)
        return stored

    def restore(self, name: str, stored: StoredDictionary) -> None:
        """Undoes `withdraw`."""
        self._moving.discard(name)
        self._entries[name] = stored

    def remove(self, name: str) -> None:
        """Ends what `withdraw` began."""
        self._moving.discard(name)

    def get(self, name: str, *, field: str = "") -> StoredDictionary:
        """The dictionary; DictionaryNotFound lists those there are."""
        if name not in self._entries:
            there = ", ".join(self.names) or "none"
            raise DictionaryNotFound(
                f"no dictionary {name[:64]!r} is resident; there are: {there}",
                name=name[:64],
                field=field,
            )
        return self._entries[name]

    def holds(self, name: str, stored: StoredDictionary) -> bool:
        """Whether requests may name `stored` by `name`."""
        return self._entries.get(name) is stored

    @property
    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[tuple[str, StoredDictionary]]:
        """Ordered by name."""
        return iter(sorted(self._entries.items()))
