"""Encodes the rows that requests asked to read, after the model ran and off its path."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.program import ReadOut
from steer_server.vllm_plugin.report import RowBlock
from steer_server.vllm_plugin.residents import Resident


class Want(NamedTuple):
    """Batch rows [first, last) of one request, for one of its read-outs."""

    request: int
    """Index into the step's requests."""
    read_out: int
    spec: ReadOut
    first: int
    last: int


class Encoded(NamedTuple):
    """Activations on their way to the host, [rows, listed], strongest or first asked for first."""

    features: Tensor
    values: Tensor
    active: Tensor | None
    """Active features of each row, [rows]."""


class Reading:
    """The rows of one dictionary that a step reads in one way; good as long as the batch stays the same."""

    def __init__(self, name: str, resident: Resident, wants: Sequence[Want]) -> None:
        self.site = resident.site
        self.edited = wants[0].spec.edited
        self._name = name
        self._resident = resident
        self._wants = [(want.request, want.read_out, want.last - want.first) for want in wants]
        self._lengths = np.array([want.last - want.first for want in wants])
        rows = np.concatenate([np.arange(want.first, want.last) for want in wants])
        self._row_numbers = rows
        together = bool((np.diff(rows) == 1).all())
        device = resident.rows.bias.device
        self._rows: slice | Tensor = (
            slice(int(rows[0]), int(rows[-1]) + 1)
            if together
            else torch.from_numpy(rows).to(device)
        )
        self._encode = self._named(wants) if wants[0].spec.features else self._strongest(wants)

    def encode(self, x: Tensor) -> Encoded:
        """What the dictionary makes of the wanted rows of `x`, the batch in float32."""
        return self._encode(x[self._rows])

    def block(self, encoded: Encoded, position_of_row: NDArray, seconds: float) -> RowBlock:
        """The encoded rows as they travel; `position_of_row` is of every row of the batch."""
        values = encoded.values.cpu().numpy()
        listed = np.abs(values) > self._above
        listed &= self._kept
        active = encoded.active
        return RowBlock(
            self._name,
            self._wants,
            position_of_row[self._row_numbers].astype(np.uint32),
            listed.sum(axis=1).astype(np.uint32),
            encoded.features.cpu().numpy()[listed].astype(np.uint32),
            values[listed],
            None if active is None else active.cpu().numpy().astype(np.uint32),
            seconds,
        )

    def _strongest(self, wants: Sequence[Want]) -> Callable[[Tensor], Encoded]:
        n_features = len(self._resident.rows.bias)
        k = min(max(want.spec.limit for want in wants), n_features)
        limits = np.repeat([want.spec.limit for want in wants], self._lengths)
        self._kept = np.arange(k) < limits[:, None]
        self._above = np.repeat([want.spec.above or 0.0 for want in wants], self._lengths)[:, None]

        def encode(x: Tensor) -> Encoded:
            f = self._resident.encode(x)
            # A direction without an encoder may be active below zero; strongest means farthest from it.
            size = f if self._resident.non_negative else f.abs()
            found = size.topk(k, dim=1)
            values = found.values if size is f else f.gather(1, found.indices)
            return Encoded(found.indices, values, torch.count_nonzero(f, dim=1))

        return encode

    def _named(self, wants: Sequence[Want]) -> Callable[[Tensor], Encoded]:
        union = sorted({feature for want in wants for feature in want.spec.features})
        widest = max(len(want.spec.features) for want in wants)
        place = np.zeros((len(wants), widest), np.int64)
        kept = np.zeros(place.shape, bool)
        for line, want in enumerate(wants):
            kept[line, : len(want.spec.features)] = True
            place[line, : len(want.spec.features)] = np.searchsorted(union, want.spec.features)
        self._kept = np.repeat(kept, self._lengths, axis=0)
        self._above = np.float32(0.0)
        device = self._resident.rows.bias.device
        columns = torch.from_numpy(np.repeat(place, self._lengths, axis=0)).to(device)
        features = torch.tensor(union, device=device)[columns]
        chosen = self._resident.rows.take(torch.tensor(union, device=device))

        def encode(x: Tensor) -> Encoded:
            f = self._resident.encode(x)[:, union] if self._resident.k else chosen.encode(x)
            return Encoded(features, f.gather(1, columns), None)

        return encode


def readings(wants: Sequence[tuple[Resident, Want]]) -> list[Reading]:
    """The wants of a step, those together that can be encoded at once."""
    groups: dict[tuple[str, bool, str], tuple[Resident, list[Want]]] = {}
    for resident, want in wants:
        spec = want.spec
        kind = "named" if spec.features else "top" if spec.top_k else "above"
        groups.setdefault((spec.dictionary, spec.edited, kind), (resident, []))[1].append(want)
    return [Reading(key[0], resident, members) for key, (resident, members) in groups.items()]


def timed(reading: Reading, x: Tensor) -> tuple[Encoded, float]:
    """The encoded rows, and the seconds it took to ask for them."""
    began = time.perf_counter()
    return reading.encode(x), time.perf_counter() - began
