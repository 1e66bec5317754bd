"""Encodes the rows that requests asked to read, after the model ran and off its path."""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.dictionary.dictionary import FeatureRows
from steer_server.generation import ActivationRows
from steer_server.program import ReadOut


class Want(NamedTuple):
    """Batch rows [first, last) of one request, whose first is at `position`, for one of its read-outs."""

    vllm_id: str
    read_out: int
    spec: ReadOut
    first: int
    last: int
    position: int


class Encoded(NamedTuple):
    """What a dictionary makes of the wanted rows."""

    rows: list[tuple[str, ActivationRows]]
    seconds: float


def encode(wants: Sequence[Want], dictionary: FeatureRows, x: Tensor) -> Encoded:
    """Reads all `wants` of one dictionary out of `x`, the batch rows before any edit, in float32."""
    began = time.perf_counter()
    found = []
    top = [want for want in wants if want.spec.top_k]
    named = [want for want in wants if not want.spec.top_k]
    if top:
        found += _top(top, dictionary, x)
    if named:
        found += _named(named, dictionary, x)
    return Encoded(found, time.perf_counter() - began)


def _top(wants: list[Want], dictionary: FeatureRows, x: Tensor) -> list[tuple[str, ActivationRows]]:
    f = dictionary.encode(_take(wants, x))
    active = torch.count_nonzero(f, dim=1).cpu().numpy().astype(np.uint32)
    k = min(max(want.spec.top_k for want in wants), f.shape[1])
    # A direction without an encoder may be active below zero; strongest means farthest from it.
    index = f.abs().topk(k, dim=1).indices
    values = f.gather(1, index).cpu().numpy()
    features = index.cpu().numpy().astype(np.uint32)
    return [
        (want.vllm_id, _pack(want, features[part, :k], values[part, :k], active[part]))
        for want, part in _parts(wants)
        for k in (want.spec.top_k,)
    ]


def _named(
    wants: list[Want], dictionary: FeatureRows, x: Tensor
) -> list[tuple[str, ActivationRows]]:
    union = sorted({feature for want in wants for feature in want.spec.features})
    place = {feature: column for column, feature in enumerate(union)}
    chosen = dictionary.take(torch.tensor(union, device=x.device))
    f = chosen.encode(_take(wants, x)).cpu().numpy()
    found = []
    for want, part in _parts(wants):
        columns = [place[feature] for feature in want.spec.features]
        values = f[part][:, columns]
        features = np.broadcast_to(np.array(want.spec.features, np.uint32), values.shape)
        found.append((want.vllm_id, _pack(want, features, values, None)))
    return found


def _take(wants: list[Want], x: Tensor) -> Tensor:
    if all(want.last == following.first for want, following in pairwise(wants)):
        return x[wants[0].first : wants[-1].last]
    return torch.cat([x[want.first : want.last] for want in wants])


def _parts(wants: list[Want]) -> list[tuple[Want, slice]]:
    stops = np.cumsum([want.last - want.first for want in wants]).tolist()
    return [
        (want, slice(stop - (want.last - want.first), stop))
        for want, stop in zip(wants, stops, strict=True)
    ]


def _pack(
    want: Want,
    features: NDArray[np.uint32],
    values: NDArray[np.float32],
    active: NDArray[np.uint32] | None,
) -> ActivationRows:
    kept = values != 0
    return ActivationRows(
        want.read_out,
        want.spec.dictionary,
        np.arange(want.position, want.position + len(values), dtype=np.uint32),
        np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.uint32),
        features[kept],
        values[kept],
        active,
    )
