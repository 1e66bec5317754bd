"""Encodes the rows that requests asked to read, after the model ran and off its path."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.program import ReadOut
from steer_server.vllm_plugin.encode_kernel import MAX_K, encode_topk
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


Encoded = tuple[Tensor, ...]
"""Features and values, [rows, listed], strongest or first asked for first; and, at full width, how many are active."""


class Reading:
    """The rows of one dictionary that a step reads in one way; good as long as the batch stays the same."""

    def __init__(self, name: str, resident: Resident, wants: Sequence[Want], kernels: bool) -> None:
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
        self._encode = (
            self._named(wants) if wants[0].spec.features else self._strongest(wants, kernels)
        )

    @property
    def requests(self) -> list[int]:
        """The step's requests that read here."""
        return sorted({request for request, _, _ in self._wants})

    def encode(self, x: Tensor) -> Encoded:
        """What the dictionary makes of the wanted rows of `x`, the batch in float32."""
        return self._encode(x[self._rows])

    def block(
        self, encoded: Sequence[Tensor], position_of_row: NDArray, seconds: float
    ) -> RowBlock:
        """The encoded rows, which are on the host, as they travel; `position_of_row` is of every row of the batch."""
        features, values, *active = (tensor.numpy() for tensor in encoded)
        listed = np.abs(values) > self._above
        listed &= self._kept
        return RowBlock(
            self._name,
            self._wants,
            position_of_row[self._row_numbers].astype(np.uint32),
            listed.sum(axis=1).astype(np.uint32),
            features[listed].astype(np.uint32),
            values[listed],
            active[0].astype(np.uint32) if active else None,
            seconds,
        )

    def _strongest(self, wants: Sequence[Want], kernels: bool) -> Callable[[Tensor], Encoded]:
        n_features = len(self._resident.rows.bias)
        k = min(max(want.spec.limit for want in wants), n_features)
        limits = np.repeat([want.spec.limit for want in wants], self._lengths)
        self._kept = np.arange(k) < limits[:, None]
        self._above = np.repeat([want.spec.above or 0.0 for want in wants], self._lengths)[:, None]

        if kernels and k <= MAX_K and not self._resident.k:
            return self._fused(k)

        def encode(x: Tensor) -> Encoded:
            f = self._resident.encode(x)
            # A direction without an encoder may be active below zero; strongest means farthest from it.
            size = f if self._resident.non_negative else f.abs()
            found = size.topk(k, dim=1)
            values = found.values if size is f else f.gather(1, found.indices)
            return found.indices, values, self._resident.count_active(f)

        return encode

    def _fused(self, k: int) -> Callable[[Tensor], Encoded]:
        rows = self._resident.rows

        def encode(x: Tensor) -> Encoded:
            return encode_topk(x, rows.encoder, rows.bias, rows.threshold, k)

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
            return features, f.gather(1, columns)

        return encode


def readings(wants: Sequence[tuple[Resident, Want]], kernels: bool) -> list[Reading]:
    """The wants of a step, those together that can be encoded at once; with Triton's kernels or without."""
    groups: dict[tuple[str, bool, str], tuple[Resident, list[Want]]] = {}
    for resident, want in wants:
        spec = want.spec
        kind = "named" if spec.features else "top" if spec.top_k else "above"
        groups.setdefault((spec.dictionary, spec.edited, kind), (resident, []))[1].append(want)
    return [Reading(key[0], *group, kernels) for key, group in groups.items()]
