"""Where the activations of two prompts differ, and the edits that carry one's over to the other."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steer_server.dictionary.edits import Patch
from steer_server.dictionary.files import StoredDictionary
from steer_server.generation import ActivationRows
from steer_server.program import FeatureEdit, Scope

_EVERYWHERE = Scope(exclude_positions=frozenset())


class Activations(NamedTuple):
    """What was read of a prompt: no feature twice at a position, and none that is missing is other than 0."""

    positions: NDArray[np.int64]
    features: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def gather(cls, parts: Sequence[ActivationRows]) -> "Activations":
        """All of the rows, in order of position."""
        counts = [np.diff(rows.row_splits) for rows in parts]
        positions = [np.repeat(rows.positions, n) for rows, n in zip(parts, counts, strict=True)]
        found = cls(
            np.concatenate([*positions, np.zeros(0, np.int64)]).astype(np.int64),
            np.concatenate([*(rows.features for rows in parts), np.zeros(0, np.int64)]).astype(
                np.int64
            ),
            np.concatenate([*(rows.values for rows in parts), np.zeros(0, np.float32)]),
        )
        return found.take(np.argsort(found.positions, kind="stable"))

    def take(self, chosen: NDArray) -> "Activations":
        return Activations(self.positions[chosen], self.features[chosen], self.values[chosen])

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], "Activations"]:
        """What is at each of the positions, which may repeat, and which of them that is."""
        first, last = (
            np.searchsorted(self.positions, positions, side) for side in ("left", "right")
        )
        counts = last - first
        rows = np.repeat(np.arange(len(positions)), counts)
        behind = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.take(np.repeat(first, counts) + behind)


class Difference(NamedTuple):
    """Where source and target differ, at the paired positions: one entry for each activation that does.

    Most do not, and a table of all would not fit: a long prompt has thousands of positions, and of features.
    """

    features: list[int]
    """Largest difference first."""
    columns: NDArray[np.int64]
    """Which of `features` an entry is of; they ascend."""
    positions: NDArray[np.int64]
    """Of the target."""
    source: NDArray[np.float32]
    target: NDArray[np.float32]

    def edits(self, dictionary: str, features: Collection[int]) -> dict[int, FeatureEdit]:
        """By feature: carries the source's activations over, where they are others."""
        splits = np.searchsorted(self.columns, np.arange(len(self.features) + 1))
        found = {}
        for column, feature in enumerate(self.features):
            if feature in features:
                own = slice(splits[column], splits[column + 1])
                places, values = self.positions[own].tolist(), self.source[own].tolist()
                patch = Patch(feature, tuple(zip(places, values, strict=True)))
                found[feature] = FeatureEdit(dictionary, patch, _EVERYWHERE)
        return found

    def norms(self, stored: StoredDictionary, features: Sequence[int]) -> NDArray[np.float64]:
        """Lengths of what the edits of `features` add to x, at each position where they do."""
        chosen = np.isin(np.array(self.features)[self.columns], features)
        rows, place = np.unique(self.positions[chosen], return_inverse=True)
        columns, column = np.unique(self.columns[chosen], return_inverse=True)
        change = np.zeros((len(rows), len(columns)))
        change[place, column] = (self.source - self.target)[chosen]
        decoder = stored.dictionary.W_dec[[self.features[c] for c in columns]].double().numpy()
        return np.linalg.norm(change @ decoder / stored.card.input_scale, axis=1)


def compare(source: Activations, target: Activations, pairs: Mapping[int, int]) -> Difference:
    """`pairs` maps target positions to source positions."""
    positions = np.array(sorted(pairs), np.int64)
    sides = []
    for side, places in ((source, [pairs[p] for p in positions.tolist()]), (target, positions)):
        rows, there = side.at(np.asarray(places, np.int64))
        sides.append((rows << 32 | there.features, there.values))
    # Each entry of either side, by what it is of.
    keys = np.unique(np.concatenate([keys for keys, _ in sides]))
    values = np.zeros((2, len(keys)), np.float32)
    for number, (own, of_side) in enumerate(sides):
        values[number, np.searchsorted(keys, own)] = of_side
    apart = values[0] != values[1]
    keys, values = keys[apart], values[:, apart]
    features, columns = np.unique(keys & (2**32 - 1), return_inverse=True)
    size = np.zeros(len(features), np.float32)
    np.maximum.at(size, columns, np.abs(values[0] - values[1]))
    largest = np.argsort(-size, kind="stable")
    rank = np.empty_like(largest)
    rank[largest] = np.arange(len(largest))
    order = np.argsort(rank[columns], kind="stable")
    return Difference(
        features[largest].tolist(),
        rank[columns][order],
        positions[(keys >> 32)[order]],
        *values[:, order],
    )
