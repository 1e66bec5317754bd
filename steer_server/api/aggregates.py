"""Numbers made of the activations of many tokens, feature by feature."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from steer_server.errors import DictionaryMismatch
from steer_server.generation import ActivationRows


class Aggregates:
    """Every feature of a dictionary over the tokens that were added; an inactive one counts as 0."""

    def __init__(self, n_features: int, first: int) -> None:
        """Positions before `first` are not counted."""
        self.tokens = 0
        self._first = first
        self.sum: NDArray[np.float64] = np.zeros(n_features)
        self._largest = np.full(n_features, -np.inf)
        self._active = np.zeros(n_features, np.int64)

    def add(self, rows: ActivationRows) -> None:
        """Rows that list every active feature; DictionaryMismatch if one has more than it had room for."""
        counted = rows.positions >= self._first
        listed = np.diff(rows.row_splits.astype(np.int64))
        assert rows.active is not None, "not read at full width"
        self._check_whole(rows.positions[counted], listed[counted], rows.active[counted])
        chosen = np.repeat(counted, listed)
        features, values = rows.features[chosen], rows.values[chosen].astype(np.float64)
        self.tokens += int(counted.sum())
        np.add.at(self.sum, features, values)
        np.maximum.at(self._largest, features, values)
        np.add.at(self._active, features, 1)

    @property
    def active(self) -> NDArray[np.intp]:
        """The features that are active somewhere."""
        return self._active.nonzero()[0]

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.sum / self.tokens

    @property
    def max(self) -> NDArray[np.float64]:
        somewhere_inactive = self._active < self.tokens
        return np.where(somewhere_inactive, np.maximum(self._largest, 0.0), self._largest)

    @property
    def frequency(self) -> NDArray[np.float64]:
        return self._active / self.tokens

    @staticmethod
    def _check_whole(positions: NDArray, listed: NDArray, active: Sequence[int] | NDArray) -> None:
        cut = (listed < active).nonzero()[0]
        if len(cut):
            row = cut[0]
            raise DictionaryMismatch(
                f"{active[row]} features are active on the token at position {positions[row]}, more than the "
                f"{listed[row]} that a token can list; nothing is left out here, so read such texts with Encode",
                field="dictionary",
            )


def strongest(values: NDArray[np.float64], features: NDArray[np.intp], count: int) -> list[int]:
    """Those of `features` with the largest values; of equal ones, the first."""
    order = np.argsort(-values[features], kind="stable")[:count]
    return features[order].tolist()
