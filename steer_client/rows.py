"""Sparse activations, token by token."""

from collections.abc import Iterator
from typing import NamedTuple

from steer.v1 import activations_pb2


class Row(NamedTuple):
    """The activations of one token."""

    position: int
    features: list[tuple[int, float]]
    """Feature and activation, in the order the read-out asked for."""
    active: int | None
    """How many features of the dictionary are active; None for a read-out of named features."""


def rows(activations: activations_pb2.SparseActivations) -> Iterator[Row]:
    """The packed arrays as one Row per position."""
    for index, position in enumerate(activations.position):
        part = slice(activations.row_splits[index], activations.row_splits[index + 1])
        pairs = zip(activations.feature[part], activations.value[part], strict=True)
        active = activations.active[index] if activations.active else None
        yield Row(position, list(pairs), active)
