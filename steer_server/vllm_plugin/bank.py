"""The rows of the features in use at one site, at fixed addresses, in slots that are counted and freed."""

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer_server.dictionary.dictionary import FeatureRows
from steer_server.vllm_plugin.transfer import to_device

Feature = tuple[str, int]
"""(dictionary, feature)."""


class Slots:
    """Which feature has which slot, and how many programs use it.

    A slot holds a feature, not a strength: strengths lie in the rows' coefficients, so a slider that moves a
    strength a thousand times takes one slot.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.owner: dict[int, Feature] = {}
        """By slot in use."""
        self._slot: dict[Feature, int] = {}
        self._uses: dict[Feature, int] = {}
        self._free = list(range(capacity))

    @property
    def used(self) -> int:
        return len(self._slot)

    def fits(self, features: Iterable[Feature]) -> bool:
        """Whether there is room for all of them, those that have a slot already being free of charge."""
        return len(set(features) - self._slot.keys()) <= len(self._free)

    def __getitem__(self, feature: Feature) -> int:
        return self._slot[feature]

    def acquire(self, features: Iterable[Feature]) -> list[Feature]:
        """Counts one more use of each; returns those that had no slot before, and have one now."""
        new = []
        for feature in sorted(set(features)):
            if feature not in self._slot:
                # The lowest first, so that those in use lie together.
                self._slot[feature] = slot = heapq.heappop(self._free)
                self.owner[slot] = feature
                self._uses[feature] = 0
                new.append(feature)
            self._uses[feature] += 1
        return new

    def release(self, features: Iterable[Feature]) -> None:
        """Counts one use less of each; a slot without a use is free."""
        for feature in set(features):
            self._uses[feature] -= 1
            if not self._uses[feature]:
                del self._uses[feature]
                slot = self._slot.pop(feature)
                del self.owner[slot]
                heapq.heappush(self._free, slot)


class Bank:
    """The slots of one site with the features' encoder and decoder rows on the device."""

    def __init__(self, capacity: int, d_model: int, device: torch.device) -> None:
        self.slots = Slots(capacity)
        self.rows = FeatureRows(
            torch.zeros(capacity, d_model, device=device),
            torch.zeros(capacity, device=device),
            torch.zeros(capacity, device=device),
            torch.zeros(capacity, d_model, device=device),
        )
        self.decoder_norm = torch.ones(capacity, device=device)

    def put(self, slots: Sequence[int], rows: FeatureRows, features: Sequence[int]) -> None:
        """Copies the rows of each of the features into its slot."""
        device = self.decoder_norm.device
        chosen, index = (
            to_device(np.array(numbers, np.int64), device) for numbers in (features, slots)
        )
        # All at once: row by row the calls would take longer than the copies.
        found = rows.take(chosen)
        for mine, theirs in zip(self.rows, found, strict=True):
            mine.index_copy_(0, index, theirs)
        self.decoder_norm.index_copy_(0, index, found.decoder.norm(dim=1))

    def at(self, slots: NDArray) -> tuple[FeatureRows, Tensor]:
        """The rows at `slots` and their decoder norms; views if they lie there in this order."""
        if (np.diff(slots) == 1).all():
            part = slice(int(slots[0]), int(slots[-1]) + 1)
            return FeatureRows(*(tensor[part] for tensor in self.rows)), self.decoder_norm[part]
        index = to_device(slots, self.decoder_norm.device)
        return self.rows.take(index), self.decoder_norm[index]
