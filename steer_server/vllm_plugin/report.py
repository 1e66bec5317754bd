"""What a worker says of a step to the front-end, in columns over the whole batch.

It crosses two process boundaries once per step, so it is plain values and packed arrays: msgpack and pickle carry
both, and no loop over requests runs in the worker.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steer_server.generation import ActivationRows


class RevisionStart(NamedTuple):
    """The first position whose row ran under the revision."""

    revision: int
    position: int


@dataclass(slots=True)
class StepResult:
    """What steps did for one request, gathered until a token carries it home."""

    applied: list[RevisionStart] = field(default_factory=list)
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """Runs of positions taken from the prefix cache."""
    rows: list[ActivationRows] = field(default_factory=list)
    encode_seconds: dict[str, float] = field(default_factory=dict)
    """By dictionary, of the whole batch; one request of it has them."""
    error: str = ""
    """Why an edit or read-out did not run; empty if all did."""
    too_large: str = ""
    """Why edits were left out: they would have moved x too far."""
    limited: int = 0
    """Tokens past the program's limit, summed over sites."""


class EditRuns(NamedTuple):
    """Which edits ran on which rows at one site; run i has `entries[i]` of the edits in `edit`."""

    request: NDArray[np.int32]
    """Index into the report's requests."""
    revision: NDArray[np.int32]
    rows: NDArray[np.int32]
    entries: NDArray[np.int32]
    edit: NDArray[np.int32]
    """Index into the revision's edits."""

    def pack(self) -> bytes:
        return np.concatenate([[len(self.request)], *self]).astype(np.int32).tobytes()

    @classmethod
    def unpack(cls, content: bytes) -> "EditRuns":
        numbers = np.frombuffer(content, np.int32)
        runs = int(numbers[0])
        request, revision, rows, entries = numbers[1 : 1 + 4 * runs].reshape(4, runs)
        return cls(request, revision, rows, entries, numbers[1 + 4 * runs :])


class EditBlock(NamedTuple):
    """What the edits of one site did in a step, array by array in bytes; they align with `EditRuns.edit`."""

    runs: bytes
    """`EditRuns`, packed: the same from step to step while the batch is."""
    changed: bytes
    """uint32: rows on which the activation changed."""
    total_size: bytes
    """float32: sum over the rows of |delta| / |x|, of this edit alone."""
    max_size: bytes
    """float32."""


class EditRows(NamedTuple):
    """What an `EditBlock` is made of, where each run is one row and all have as many edits; float32 in bytes.

    A decoding step leaves the arithmetic to whoever does it for many steps at once.
    """

    runs: bytes
    decoder_norm: bytes
    """[runs, edits], as steady as the runs."""
    change: bytes
    """f' - f, [runs, edits]."""
    x_norm: bytes
    """|x|, [runs]."""


def relative_size(change: NDArray, x_norm: NDArray, decoder_norm: NDArray) -> NDArray[np.float32]:
    """|delta| / |x| of each edit alone."""
    return np.asarray(np.abs(change) * (decoder_norm / x_norm), np.float32)


class RowBlock(NamedTuple):
    """Sparse activations of one dictionary for several read-outs, row by row."""

    dictionary: str
    wants: Sequence[Sequence[int]]
    """(index into the report's requests, read-out, number of rows), in the order of the rows."""
    positions: NDArray[np.uint32]
    counts: NDArray[np.uint32]
    """Features listed per row."""
    features: NDArray[np.uint32]
    values: NDArray[np.float32]
    active: NDArray[np.uint32] | None
    seconds: float


@dataclass
class StepReport:
    """One worker's report of one step."""

    requests: list[str]
    """vLLM's ids of the requests with a program."""
    applied: list[tuple[int, int, int]] = field(default_factory=list)
    """(request, revision, position)."""
    skipped: list[tuple[int, int, int]] = field(default_factory=list)
    """(request, start, stop)."""
    errors: list[tuple[int, str]] = field(default_factory=list)
    """(request, why a read-out of it did not run)."""
    missed: list[tuple[int, int, str]] = field(default_factory=list)
    """(request, the first position at which its edits did not run, why)."""
    too_large: list[tuple[int, int, str]] = field(default_factory=list)
    """(request, the first position at which its edits were left out, why)."""
    limited: list[tuple[int, int]] = field(default_factory=list)
    """(request, tokens past its program's limit), site by site."""
    edits: list[EditBlock] = field(default_factory=list)
    edit_rows: list[EditRows] = field(default_factory=list)
    rows: list[RowBlock] = field(default_factory=list)

    def to_wire(self) -> list[Any]:
        return [
            self.requests,
            self.applied,
            self.skipped,
            self.errors,
            self.missed,
            self.too_large,
            self.limited,
            self.edits,
            self.edit_rows,
            [
                [
                    block.dictionary,
                    block.wants,
                    *(array.tobytes() for array in block[2:6]),
                    None if block.active is None else block.active.tobytes(),
                    block.seconds,
                ]
                for block in self.rows
            ],
        ]

    @classmethod
    def from_wire(cls, content: list[Any]) -> "StepReport":
        requests, applied, skipped, errors, missed, too_large, limited, *blocks = content
        edits, edit_rows, rows = blocks
        return cls(
            requests,
            applied,
            skipped,
            errors,
            missed,
            too_large,
            limited,
            [EditBlock(*block) for block in edits],
            [EditRows(*block) for block in edit_rows],
            [_row_block(*block) for block in rows],
        )

    def deliver(self, result_of: Callable[[str], StepResult]) -> None:
        """Adds what each request is owed, its edits aside, to its result, which `result_of` finds by vLLM's id."""
        ids = self.requests
        for request, revision, position in self.applied:
            result_of(ids[request]).applied.append(RevisionStart(revision, position))
        for request, start, stop in self.skipped:
            result_of(ids[request]).skipped.append((start, stop))
        for request, error in self.errors:
            result_of(ids[request]).error = error
        for request, _, why in self.missed:
            result_of(ids[request]).error = why
        for request, _, why in self.too_large:
            result_of(ids[request]).too_large = why
        for request, tokens in self.limited:
            result_of(ids[request]).limited += tokens
        for block in self.rows:
            for request, rows in _rows(block):
                result_of(ids[request]).rows.append(rows)
            # Of all together, and so told once.
            seconds = result_of(ids[block.wants[0][0]]).encode_seconds
            seconds[block.dictionary] = seconds.get(block.dictionary, 0.0) + block.seconds


def _rows(block: RowBlock) -> Iterable[tuple[int, ActivationRows]]:
    dictionary, wants, positions, counts, features, values, active, _ = block
    ends = list(accumulate(counts.tolist(), initial=0))
    # Most read-outs are of one row in a step; an array for each would take as long as all the rest.
    alone = np.zeros((len(counts), 2), np.uint32)
    alone[:, 1] = counts
    first = 0
    for request, read_out, n_rows in wants:
        last = first + n_rows
        start, stop = ends[first], ends[last]
        yield (
            request,
            ActivationRows(
                read_out,
                dictionary,
                positions[first:last],
                alone[first]
                if n_rows == 1
                else np.array([end - start for end in ends[first : last + 1]], np.uint32),
                features[start:stop],
                values[start:stop],
                None if active is None else active[first:last],
            ),
        )
        first = last


def _row_block(
    dictionary: str,
    wants: list[list[int]],
    positions: bytes,
    counts: bytes,
    features: bytes,
    values: bytes,
    active: bytes | None,
    seconds: float,
) -> RowBlock:
    return RowBlock(
        dictionary,
        wants,
        np.frombuffer(positions, np.uint32),
        np.frombuffer(counts, np.uint32),
        np.frombuffer(features, np.uint32),
        np.frombuffer(values, np.float32),
        None if active is None else np.frombuffer(active, np.uint32),
        seconds,
    )
