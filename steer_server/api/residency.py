"""Dictionaries that come and go while the server serves."""

import asyncio
import re
from pathlib import Path

from steer_server.api.generations import Generations
from steer_server.dictionary.card import Card
from steer_server.dictionary.files import CARD, StoredDictionary, check_served, load
from steer_server.errors import (
    CorruptDictionary,
    DictionaryInUse,
    DictionaryNotFound,
    InvalidRequest,
    NotConfigured,
)
from steer_server.memory import check_fits

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Residency:
    """Loads and unloads; nothing is changed by what fails."""

    def __init__(self, generations: Generations, root: Path | None) -> None:
        """`root` is the only folder that dictionaries are loaded from."""
        self._generations = generations
        self._root = root
        # One at a time, so that two do not both take the last of the memory.
        self._loading = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    async def load(self, folder: str, name: str) -> tuple[str, StoredDictionary]:
        """The name and the dictionary, once requests may name it."""
        try:
            path = self._find(folder)
            card = Card.from_json((path / CARD).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptDictionary(f"{folder!r} has no {CARD} that can be read") from error
        name, field = (name, "name") if name else (card.name, "folder")
        registry, engine = self._generations.registry, self._generations.engine
        with registry.adding(name, field=field):
            async with self._loading:
                check_served(card)
                stored = await asyncio.to_thread(_read, path, card, engine.workers)
                await engine.add_dictionary(name, stored)
            registry.add(name, stored)
            self._generations.metrics.add_dictionary(name, stored)
        return name, stored

    async def unload(self, name: str, wait: bool) -> None:
        """Returns when it is gone. DictionaryInUse while requests run that use it, unless it may `wait` for them."""
        registry, uses = self._generations.registry, self._generations.uses
        stored = registry.withdraw(name, field="name")
        try:
            users = uses.count(name)
            if users and not wait:
                raise DictionaryInUse(
                    f"{users} running requests read or edit {name!r}, or its watched features; wait for them, or set "
                    "wait",
                    field="name",
                )
            await uses.until_unused(name)
        except BaseException:
            registry.restore(name, stored)
            raise
        # What has begun is ended, whatever becomes of the call.
        leaving = asyncio.ensure_future(self._remove(name))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        await asyncio.shield(leaving)

    async def _remove(self, name: str) -> None:
        self._generations.watch.forget(name)
        await self._generations.engine.remove_dictionary(name)
        self._generations.metrics.remove_dictionary(name)
        self._generations.registry.remove(name)

    def _find(self, folder: str) -> Path:
        """The folder of that name in the root, and nowhere else."""
        if not _FOLDER.fullmatch(folder):
            raise InvalidRequest(
                f"{folder[:64]!r} is not 1 to 64 of a-z, A-Z, 0-9, dot, dash and underscore, the first a letter or "
                "digit",
                field="folder",
            )
        if self._root is None:
            raise NotConfigured(
                "this server loads no dictionaries while it runs: start it with dictionary_root"
            )
        root = self._root.resolve()
        path = (root / folder).resolve()
        if not path.is_dir() or not _inside(path, root):
            raise DictionaryNotFound(
                f"there is no folder {folder!r} in dictionary_root", name=folder, field="folder"
            )
        return path


def _inside(path: Path, root: Path) -> bool:
    """Whether neither the folder nor a file of it is a link that leads out of the root."""
    return all(part.resolve().is_relative_to(root) for part in (path, *path.iterdir()))


def _read(path: Path, card: Card, workers: int) -> StoredDictionary:
    try:
        check_fits(path, card, workers)
        return load(path)
    except OSError as error:
        raise CorruptDictionary(
            f"a file of dictionary {card.name!r} cannot be read: {error.strerror}"
        ) from error
