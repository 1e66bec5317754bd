"""Encodes the rows that requests asked to read, after the model ran and off its path."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.program import ReadOut
from steer_server.vllm_plugin.encode_kernel import MAX_K, encode_topk
from steer_server.vllm_plugin.report import RowBlock
from steer_server.vllm_plugin.residents import Resident, in_parts, rows_at_once
from steer_server.vllm_plugin.strongest import strongest
from steer_server.vllm_plugin.transfer import to_device


class Want(NamedTuple):
    """Batch rows [first, last) of one request, for one of its read-outs."""

    request: int
    """Index into the step's requests."""
    read_out: int
    spec: ReadOut
    first: int
    last: int


Listed = tuple[NDArray, NDArray, NDArray, NDArray | None]
"""How many features of each row; the features and values, row after row; and how many are active."""
Encoded = tuple[Tensor | NDArray, ...]
"""What encoding leaves for `Reading.block`: mostly features and values [rows, k], and, at full width, how many are active."""


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
        self._rows: slice | Tensor = slice(wants[0].first, wants[-1].last)
        if any(want.last != following.first for want, following in pairwise(wants)):
            self._rows = to_device(rows, resident.rows.bias.device)
        self._encode, self._list = (
            self._named(wants) if wants[0].spec.features else self._strongest(wants, kernels)
        )

    @property
    def requests(self) -> list[int]:
        """The step's requests that read here."""
        return sorted({request for request, _, _ in self._wants})

    def requests_at(self, chosen: NDArray[np.bool_]) -> set[int]:
        """Those that any of the `chosen` ones among the wanted rows is of."""
        of_row = np.repeat([request for request, _, _ in self._wants], self._lengths)
        return set(of_row[chosen].tolist())

    def rows_of(self, x: Tensor) -> Tensor:
        """The wanted rows of `x`, the batch in float32."""
        rows = self._rows
        return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)

    def encode(self, rows: Tensor) -> Encoded:
        """What the dictionary makes of the wanted rows."""
        return self._encode(rows)

    def block(
        self, encoded: Sequence[NDArray], position_of_row: NDArray, seconds: float
    ) -> RowBlock:
        """The encoded rows, which are on the host, as they travel; `position_of_row` is of every row of the batch."""
        positions = position_of_row[self._row_numbers].astype(np.uint32)
        return RowBlock(self._name, self._wants, positions, *self._list(*encoded), seconds)

    def _strongest(self, wants: Sequence[Want], kernels: bool) -> "_Way":
        resident = self._resident
        n_features = len(resident.rows.bias)
        most = min(resident.k or n_features, n_features)
        limits = np.repeat([min(want.spec.limit, most) for want in wants], self._lengths)
        above = np.repeat([float(want.spec.above or 0) for want in wants], self._lengths)
        if not kernels and resident.sparse:
            return _one_pass(resident, above, limits, most)
        k = int(limits.max())
        kept = np.arange(k) < limits[:, None]
        encode = (
            _fused(resident, k)
            if kernels and k <= MAX_K and not resident.k
            else _by_topk(resident, k)
        )
        return encode, partial(_listed, above[:, None], kept)

    def _named(self, wants: Sequence[Want]) -> "_Way":
        resident = self._resident
        union = sorted({feature for want in wants for feature in want.spec.features})
        widest = max(len(want.spec.features) for want in wants)
        place = np.zeros((len(wants), widest), np.int64)
        kept = np.zeros(place.shape, bool)
        for line, want in enumerate(wants):
            kept[line, : len(want.spec.features)] = True
            place[line, : len(want.spec.features)] = np.searchsorted(union, want.spec.features)
        device = resident.rows.bias.device
        place = np.repeat(place, self._lengths, axis=0)
        columns = to_device(place, device)
        features = to_device(np.array(union)[place], device)
        numbers = to_device(np.array(union), device)
        chosen = resident.rows.take(numbers)

        def values(x: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
            f = resident.encode_by_rank(x, numbers) if resident.k else chosen.encode(x)
            return (f.gather(1, columns),)

        def encode(x: Tensor) -> Encoded:
            return features, *in_parts(values, len(union), x, columns)

        return encode, partial(_listed, np.zeros(1), np.repeat(kept, self._lengths, axis=0))


_Way = tuple[Callable[[Tensor], Encoded], Callable[..., Listed]]
"""Encodes rows on the device, and lists on the host what that has left."""


def _one_pass(resident: Resident, above: NDArray, limits: NDArray, most: int) -> _Way:
    """At most `most` features of a row are active, the largest."""
    threshold = resident.rows.threshold.numpy()

    def encode(x: Tensor) -> Encoded:
        height = rows_at_once(len(threshold))
        if len(x) <= height:
            return (resident.preactivations(x),)
        parts = [slice(first, first + height) for first in range(0, len(x), height)]
        found = [listed_of(resident.preactivations(x[part]).numpy(), part) for part in parts]
        return tuple(np.concatenate(column) for column in zip(*found, strict=True))  # type: ignore[arg-type]

    def listed_of(z: NDArray, part: slice) -> Listed:
        counts, features, values, active = strongest(z, threshold, above[part], limits[part])
        return counts, features, values, np.minimum(active, most)

    def listed(*encoded: Any) -> Listed:
        z, *rest = encoded
        return encoded if rest else listed_of(z, slice(None))

    return encode, listed


def _by_topk(resident: Resident, k: int) -> Callable[[Tensor], Encoded]:
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        f = resident.encode(x)
        # A direction without an encoder may be active below zero; strongest means farthest from it.
        found = f.abs().topk(k, dim=1)
        return found.indices.int(), f.gather(1, found.indices), torch.count_nonzero(f, dim=1)

    return partial(in_parts, encode, len(resident.rows.bias))


def _fused(resident: Resident, k: int) -> Callable[[Tensor], Encoded]:
    rows = resident.rows

    def encode(x: Tensor) -> Encoded:
        return encode_topk(x, rows.encoder, rows.bias, rows.threshold, k)

    return encode


def _listed(
    above: NDArray,
    kept: NDArray,
    features: NDArray,
    values: NDArray,
    active: NDArray | None = None,
) -> Listed:
    listed = np.abs(values) > above
    listed &= kept
    return (
        listed.sum(axis=1).astype(np.uint32),
        features[listed].astype(np.uint32),
        values[listed],
        None if active is None else active.astype(np.uint32),
    )


def readings(wants: Sequence[tuple[Resident, Want]], kernels: bool) -> list[Reading]:
    """The wants of a step, those together that can be encoded at once; with Triton's kernels or without."""
    groups: dict[tuple[str, bool, str], tuple[Resident, list[Want]]] = {}
    for resident, want in wants:
        spec = want.spec
        kind = "named" if spec.features else "top" if spec.top_k else "above"
        groups.setdefault((spec.dictionary, spec.edited, kind), (resident, []))[1].append(want)
    return [Reading(key[0], *group, kernels) for key, group in groups.items()]
