"""The programs that a front-end lets in. Equal ones are looked through once, however many requests bring them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from steer_server.admission import check, wire
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from steer_server.program import Program

_KEPT, _LONGEST = 128, 16_384
"""Programs that are remembered, and characters of the JSON of one, so that not even all of them take much memory."""


class Admitted(NamedTuple):
    """A program that may run here, and what is made of it."""

    program: Program
    """With absolute positions."""
    content: Mapping[str, Any]
    """As `wire`."""
    digest: str
    """As `Program.digest`."""


class Admission:
    """The dictionaries that programs may name, and the programs that named them."""

    def __init__(self, sites: Sequence[Site], slots: int) -> None:
        self.sites = list(sites)
        self.slots = slots
        self._dictionaries: dict[str, StoredDictionary] = {}
        self.dictionaries: Mapping[str, StoredDictionary] = MappingProxyType(self._dictionaries)
        self._known: dict[Program, Admitted] = {}

    def add(self, name: str, stored: StoredDictionary) -> None:
        """From now on programs may name it."""
        self._dictionaries[name] = stored
        self._known.clear()

    def remove(self, name: str) -> None:
        """From now on no program may name it."""
        del self._dictionaries[name]
        self._known.clear()

    def admit(self, program: Program, prompt_length: int) -> Admitted:
        """InvalidRequest if the program names what is not there, or no engine of this size could ever run it."""
        found = self._known.get(program)
        if found is None:
            check(program, self._dictionaries)
            resolved = program.resolve(prompt_length)
            content = wire(resolved, self._dictionaries, self.sites, self.slots)
            hashes = {name: stored.card.arithmetic for name, stored in self._dictionaries.items()}
            found = Admitted(resolved, content, resolved.digest(hashes))
            # With relative positions it is another program for each length of a prompt.
            if resolved is program and len(content["program"]) <= _LONGEST:
                if len(self._known) == _KEPT:
                    del self._known[next(iter(self._known))]
                self._known[program] = found
        return found
