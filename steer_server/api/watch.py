"""The watched features: what every generation reads of them, and what is counted of that."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from steer_server.generation import ActivationRows
from steer_server.metrics import Metrics
from steer_server.program import ReadOut
from steer_server.registry import Registry

Watched = tuple[str, int]
"""(dictionary, feature)."""


@dataclass
class Count:
    """Of one feature's activations."""

    tokens: int = 0
    total: float = 0.0
    largest: float = 0.0


@dataclass(eq=False)
class Tally:
    """Counts since the last `take`."""

    counts: dict[Watched, Count] = field(default_factory=dict)

    def take(self) -> dict[Watched, Count]:
        taken, self.counts = self.counts, {}
        return taken


class Watch:
    """One per server; the list may be replaced while it serves."""

    def __init__(
        self, metrics: Metrics, registry: Registry, features: Mapping[str, Sequence[int]]
    ) -> None:
        """`metrics` have the series of `features`, which are by dictionary, already."""
        self._metrics = metrics
        self._registry = registry
        self._features = {(name, feature) for name in features for feature in features[name]}
        self._tallies: set[Tally] = set()

    def __iter__(self) -> Iterator[Watched]:
        """In order of dictionary and index."""
        return iter(sorted(self._features))

    def read_outs(self) -> tuple[ReadOut, ...]:
        """What a generation that begins now reads for them."""
        by_name: dict[str, list[int]] = {}
        for name, feature in self:
            if name in self._registry:
                by_name.setdefault(name, []).append(feature)
        return tuple(
            ReadOut(name, features=tuple(features), complete=False)
            for name, features in by_name.items()
        )

    def replace(self, features: Sequence[Watched]) -> list[Watched]:
        """Watches these, which are of resident dictionaries, and returns those that were watched."""
        before, wanted = list(self), set(features)
        for name, feature in self._features - wanted:
            self._metrics.unwatch(name, feature)
        for name, feature in wanted - self._features:
            self._metrics.watch(name, self._registry.get(name), feature)
        self._features = wanted
        return before

    def forget(self, name: str) -> None:
        """The dictionary is gone."""
        self.replace([entry for entry in self if entry[0] != name])

    @contextmanager
    def tally(self) -> Iterator[Tally]:
        """Counts for one who asks, within the block."""
        tally = Tally()
        self._tallies.add(tally)
        try:
            yield tally
        finally:
            self._tallies.discard(tally)

    def observe(self, rows: ActivationRows) -> None:
        """Counts what a generation read; of a feature that is no longer watched, nothing."""
        for feature in np.unique(rows.features).tolist():
            key = rows.dictionary, feature
            if key not in self._features:
                continue
            values = rows.values[rows.features == feature]
            self._metrics.feature_activation.observe((rows.dictionary, str(feature)), values)
            total, largest = float(values.sum(dtype=np.float64)), float(values.max())
            for tally in self._tallies:
                count = tally.counts.get(key)
                if count is None:
                    tally.counts[key] = Count(len(values), total, largest)
                else:
                    count.tokens += len(values)
                    count.total += total
                    count.largest = max(count.largest, largest)
