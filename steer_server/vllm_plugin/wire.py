"""What crosses the process boundary between the front-end and the workers.

Programs travel in `SamplingParams.extra_args["steer"]` and in updates; results travel with the tokens they belong to.
Only plain values, so that msgpack and pickle both carry them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from steer_server.dictionary.edits import Coefficients, coefficients
from steer_server.generation import ActivationRows
from steer_server.program import Program, ReadOut, Scope

KEY = "steer"


class RowEdit(NamedTuple):
    """An edit as the worker needs it."""

    dictionary: str
    feature: int
    coefficients: Coefficients
    scope: Scope


@dataclass(frozen=True)
class WorkerProgram:
    """A program as the worker holds it."""

    edits: tuple[RowEdit, ...]
    read_outs: tuple[ReadOut, ...]

    @classmethod
    def from_wire(cls, content: Mapping[str, Any]) -> Self:
        edits = tuple(
            RowEdit(
                name,
                feature,
                Coefficients(*numbers),
                Scope(prompt, generated, frozenset(excluded)),
            )
            for name, feature, numbers, prompt, generated, excluded in content["edits"]
        )
        read_outs = tuple(
            ReadOut(name, top_k, tuple(features), prompt, generated)
            for name, top_k, features, prompt, generated in content["read_outs"]
        )
        return cls(edits, read_outs)


def program_to_wire(program: Program) -> dict[str, Any]:
    """`program` for `WorkerProgram.from_wire`."""
    edits = [
        [
            entry.dictionary,
            entry.edit.feature,
            list(coefficients(entry.edit)),
            entry.scope.prompt,
            entry.scope.generated,
            sorted(entry.scope.exclude_positions),
        ]
        for entry in program.edits
    ]
    read_outs = [
        [entry.dictionary, entry.top_k, list(entry.features), entry.prompt, entry.generated]
        for entry in program.read_outs
    ]
    return {"edits": edits, "read_outs": read_outs}


class RevisionStart(NamedTuple):
    """The first position whose row ran under the revision."""

    revision: int
    position: int


class EditTally(NamedTuple):
    """What the edits of one revision did on `rows` rows, all in their scope; arrays align with `edits`."""

    revision: int
    rows: int
    edits: NDArray[np.uint32]
    changed: NDArray[np.uint32]
    """Rows on which the activation changed."""
    total_size: NDArray[np.float32]
    """Sum over the rows of |delta| / |x|, of this edit alone."""
    max_size: NDArray[np.float32]


@dataclass
class StepResult:
    """What one step did for one request, gathered over steps until a token carries it home."""

    applied: list[RevisionStart] = field(default_factory=list)
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """Runs of positions taken from the prefix cache."""
    tallies: list[EditTally] = field(default_factory=list)
    rows: list[ActivationRows] = field(default_factory=list)
    encode_seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""
    """Why an edit or read-out did not run; empty if all did."""
    too_large: bool = False
    """An edit would have moved x beyond what the model can compute with; it was left out."""

    def to_wire(self) -> list[Any]:
        return [
            [list(entry) for entry in self.applied],
            [list(entry) for entry in self.skipped],
            [[entry.revision, entry.rows, *map(_pack, entry[2:])] for entry in self.tallies],
            [_rows_to_wire(entry) for entry in self.rows],
            self.encode_seconds,
            self.error,
            self.too_large,
        ]

    @classmethod
    def from_wire(cls, content: list[Any]) -> Self:
        applied, skipped, tallies, rows, seconds, error, too_large = content
        return cls(
            [RevisionStart(*entry) for entry in applied],
            [(start, stop) for start, stop in skipped],
            [_tally_from_wire(*entry) for entry in tallies],
            [_rows_from_wire(entry) for entry in rows],
            seconds,
            error,
            too_large,
        )


def _pack(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _integers(data: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(data, np.uint32)


def _floats(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, np.float32)


def _tally_from_wire(
    revision: int, rows: int, edits: bytes, changed: bytes, total: bytes, largest: bytes
) -> EditTally:
    return EditTally(
        revision, rows, _integers(edits), _integers(changed), _floats(total), _floats(largest)
    )


def _rows_to_wire(rows: ActivationRows) -> list[Any]:
    return [
        rows.read_out,
        rows.dictionary,
        _pack(rows.positions),
        _pack(rows.row_splits),
        _pack(rows.features),
        _pack(rows.values),
        None if rows.active is None else _pack(rows.active),
    ]


def _rows_from_wire(content: list[Any]) -> ActivationRows:
    read_out, name, positions, splits, features, values, active = content
    return ActivationRows(
        read_out,
        name,
        _integers(positions),
        _integers(splits),
        _integers(features),
        _floats(values),
        None if active is None else _integers(active),
    )
