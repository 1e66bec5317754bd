"""The dictionaries that a worker holds in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from steer_server.dictionary import files
from steer_server.dictionary.dictionary import FeatureRows
from steer_server.dictionary.site import Site
from steer_server.errors import CorruptDictionary, DictionaryMismatch


class Resident(NamedTuple):
    """One dictionary on the worker's device."""

    site: int
    """Number of its site among the served ones."""
    rows: FeatureRows


class Residents(dict[str, Resident]):
    """By name."""

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        super().__init__()
        self._sites = list(sites)
        self._device = device

    def load(self, name: str, folder: Path, arithmetic: str) -> None:
        """Loads a folder that the front-end has verified; it must still be the same dictionary."""
        stored = files.load(folder)
        if stored.card.arithmetic != arithmetic:
            raise CorruptDictionary(f"{folder} changed while dictionary {name!r} was being loaded")
        if stored.card.site not in self._sites:
            raise DictionaryMismatch(
                f"dictionary {name!r} is of site {stored.card.site}; this engine was started with "
                f"{', '.join(map(str, self._sites))}"
            )
        rows = FeatureRows(*(tensor.to(self._device) for tensor in stored.dictionary.rows))
        self[name] = Resident(self._sites.index(stored.card.site), rows)

    def gather(self, wanted: Sequence[tuple[str, int]]) -> FeatureRows:
        """The rows of (dictionary, feature) pairs, in the given order."""
        names = list(dict.fromkeys(name for name, _ in wanted))
        parts, order = [], []
        for name in names:
            places = [place for place, (owner, _) in enumerate(wanted) if owner == name]
            index = torch.tensor([wanted[place][1] for place in places], device=self._device)
            parts.append(self[name].rows.take(index))
            order += places
        if len(parts) == 1:
            return parts[0]
        joined = FeatureRows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return joined.take(torch.tensor(order, device=self._device).argsort())
