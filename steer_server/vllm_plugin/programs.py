"""The programs of a worker's running requests. Equal ones are one object, and what is made of one is made once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from steer_server.dictionary.edits import coefficients
from steer_server.program import Program
from steer_server.program_json import from_json
from steer_server.vllm_plugin.bank import Slots
from steer_server.vllm_plugin.residents import Residents
from steer_server.vllm_plugin.site_edits import Bounds, Entries

_KEPT = 1024
"""Choices of a program's edits that are kept; token ids and positions may make of them as many as there are rows."""


@dataclass(eq=False)
class _Running:
    text: str
    uses: int = 0
    entries: dict[tuple[tuple[int, ...], int], Mapping[int, Entries]] = field(default_factory=dict)


class Programs:
    """By their JSON. While one runs, its features have slots and its dictionaries' rows are there."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._by_text: dict[str, Program] = {}
        self._running: dict[int, _Running] = {}
        """By the program's identity."""

    def acquire(self, text: str) -> Program:
        """The program that `text` says, in use once more."""
        program = self._by_text.get(text)
        if program is None:
            program = from_json(msgspec.json.decode(text))
            self._residents.acquire(program.features)
            self._by_text[text] = program
            self._running[id(program)] = _Running(text)
        self._running[id(program)].uses += 1
        return program

    def release(self, program: Program) -> None:
        """Undoes one `acquire`."""
        running = self._running[id(program)]
        running.uses -= 1
        if not running.uses:
            self._residents.release(program.features)
            del self._by_text[running.text], self._running[id(program)]

    def entries(
        self, program: Program, edits: tuple[int, ...], position: int
    ) -> Mapping[int, Entries]:
        """Those of its edits at these indices as the sites want them, by site number."""
        made = self._running[id(program)].entries
        key = edits, position if program.patches else 0
        if key not in made:
            if len(made) == _KEPT:
                made.clear()
            made[key] = self._make(program, edits, position)
        return made[key]

    def _make(
        self, program: Program, edits: tuple[int, ...], position: int
    ) -> Mapping[int, Entries]:
        by_site: dict[int, list[int]] = {}
        for index in edits:
            resident = self._residents.get(program.edits[index].dictionary)
            if resident is not None:
                by_site.setdefault(resident.site, []).append(index)
        return {
            site: _of_site(program, indices, position, self._residents.banks[site].slots)
            for site, indices in by_site.items()
        }


def _of_site(program: Program, indices: Sequence[int], position: int, slots: Slots) -> Entries:
    edits = [program.edits[index] for index in indices]
    own = [slots[entry.dictionary, entry.edit.feature] for entry in edits]
    when = [
        slot if entry.when is None else slots[entry.when.dictionary, entry.when.feature]
        for slot, entry in zip(own, edits, strict=True)
    ]
    above = [-np.inf if entry.when is None else entry.when.above for entry in edits]
    return Entries(
        np.array(indices, np.uint32),
        np.array(own, np.int32),
        np.array([coefficients(entry.edit, position) for entry in edits], np.float32).T,
        np.array(when, np.int32),
        np.array(above, np.float32),
        Bounds.of(program),
    )
