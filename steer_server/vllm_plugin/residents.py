"""The dictionaries that a worker holds in memory, and the features of theirs that programs use."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from steer_server.dictionary import files
from steer_server.dictionary.dictionary import Dictionary, FeatureRows, keep_largest
from steer_server.dictionary.linear import linear, pack
from steer_server.dictionary.site import Site
from steer_server.errors import CorruptDictionary, DictionaryMismatch, OutOfMemory
from steer_server.vllm_plugin.bank import Bank, Feature

PART_BYTES = 2**26
"""At full width so many rows at once as take no more: a long prefill's would not fit beside the model, nor stay in caches."""
_SMALL = 2**20
"""Bytes for which a GPU always has room beside a step's, as for the self-test's one direction."""


class Resident(NamedTuple):
    """One dictionary on the worker's device."""

    site: int
    """Number of its site among the served ones."""
    rows: FeatureRows
    k: int
    """Active features per token of a TopK dictionary, else 0."""
    sparse: bool
    """Whether it is on the host and no feature is active that does not pass a threshold of 0 or more."""
    rectified: bool
    """Whether every threshold is 0."""
    packed: Tensor | None
    """The encoder once more, as `linear` likes it best."""

    def encode(self, x: Tensor) -> Tensor:
        """As `Dictionary.encode`."""
        f = self.rows.encode(x, rectified=self.rectified, packed=self.packed)
        return keep_largest(f, self.k) if self.k else f

    def encode_by_rank(self, x: Tensor, features: Tensor) -> Tensor:
        """The activations of some features of a TopK dictionary, which have to be among the k largest of all."""
        width = len(self.rows.bias)
        return in_parts(lambda part: (self.encode(part).index_select(1, features),), width, x)[0]

    def preactivations(self, x: Tensor) -> Tensor:
        """The activations where they pass the threshold, and elsewhere what does not."""
        return linear(x, self.rows.encoder, self.rows.bias, packed=self.packed)


def rows_at_once(width: int) -> int:
    """So many that `width` values of each fit `PART_BYTES`."""
    return max(1, PART_BYTES // (4 * width))


def in_parts(
    encode: Callable[..., tuple[Tensor, ...]], width: int, *tables: Tensor
) -> tuple[Tensor, ...]:
    """`encode` of the rows of the tables, which has `width` values of each in memory: so some at once."""
    most, n_rows = rows_at_once(width), len(tables[0])
    if n_rows <= most:
        return encode(*tables)
    found: tuple[Tensor, ...] = ()
    for first in range(0, n_rows, most):
        part = encode(*(table[first : first + most] for table in tables))
        found = found or tuple(column.new_empty(n_rows, *column.shape[1:]) for column in part)
        for whole, column in zip(found, part, strict=True):
            whole[first : first + most] = column
    return found


class Residents(dict[str, Resident]):
    """By name. With pipeline parallelism a worker holds those of its own sites only."""

    def __init__(
        self,
        sites: Sequence[Site],
        here: Sequence[int],
        banks: dict[int, Bank],
        device: torch.device,
        by_rank: bool = True,
    ) -> None:
        """`here` are the numbers of the sites in this process; without `by_rank` it takes no TopK dictionaries."""
        super().__init__()
        self._sites = list(sites)
        self._here = set(here)
        self._device = device
        self._by_rank = by_rank
        self.kept_free = 0
        """Bytes of a GPU that no dictionary may take, because the model's steps do."""
        self.banks = banks

    def load(self, name: str, folder: Path, arithmetic: str) -> None:
        """As `read` and `place`."""
        self.place(name, self.read(name, folder, arithmetic))

    def add(self, name: str, site: Site, dictionary: Dictionary) -> None:
        """As `prepare` and `place`."""
        self.place(name, self.prepare(name, site, dictionary))

    def read(self, name: str, folder: Path, arithmetic: str) -> Resident | None:
        """As `prepare`, of a folder that the front-end has verified; it must still be the same dictionary."""
        stored = files.load(folder)
        if stored.card.arithmetic != arithmetic:
            raise CorruptDictionary(f"dictionary {name!r} changed while it was being loaded")
        return self.prepare(name, stored.card.site, stored.dictionary)

    def prepare(self, name: str, site: Site, dictionary: Dictionary) -> Resident | None:
        """All of the work that `place` need not do, which a thread beside the model's may; None if it is not for here.

        DictionaryMismatch if the engine was not started with its site, or does not serve its kind.
        """
        if site not in self._sites:
            raise DictionaryMismatch(
                f"dictionary {name!r} is of site {site}; this engine was started with "
                f"{', '.join(map(str, self._sites))}"
            )
        if dictionary.k and not self._by_rank:
            raise DictionaryMismatch(
                f"dictionary {name!r} is a TopK, which needs all features to know one: it is not served under CUDA "
                "graphs; start the engine with enforce_eager"
            )
        number = self._sites.index(site)
        if number not in self._here:
            return None
        rows = FeatureRows(*(tensor.contiguous() for tensor in dictionary.rows))
        on_host = self._device.type == "cpu"
        return Resident(
            number,
            rows,
            dictionary.k,
            sparse=on_host and bool((rows.threshold >= 0).all()),
            rectified=bool((rows.threshold == 0).all()),
            packed=pack(rows.encoder) if on_host else None,
        )

    def place(self, name: str, resident: Resident | None) -> None:
        """Makes resident what is prepared; OutOfMemory if a GPU has no room for it beside the model's steps."""
        if resident is None:
            return
        needed = 4 * sum(tensor.numel() for tensor in resident.rows)
        if self._device.type == "cuda" and needed >= _SMALL:
            # What torch holds and does not use may be of a CUDA graph's own pool, or in pieces.
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self._device)[0] - self.kept_free
            if needed > free:
                raise OutOfMemory(
                    f"dictionary {name!r} takes {needed >> 20} MiB of the GPU; {max(0, free) >> 20} MiB are free beside "
                    f"{self.kept_free >> 20} MiB for the model's steps: unload another one, or start with a smaller "
                    "gpu_memory_utilization, which is vLLM's share"
                )
        try:
            rows = FeatureRows(*(tensor.to(self._device) for tensor in resident.rows))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"dictionary {name!r} does not fit the GPU: {error}") from error
        self[name] = resident._replace(rows=rows)

    def acquire(self, features: Iterable[Feature]) -> None:
        """Gives each feature of a site of this process a slot; its rows are there before the next step."""
        for site, wanted in self._by_site(features).items():
            bank = self.banks[site]
            new = bank.slots.acquire(wanted)
            for name in {name for name, _ in new}:
                own = [feature for owner, feature in new if owner == name]
                bank.put([bank.slots[name, feature] for feature in own], self[name].rows, own)

    def release(self, features: Iterable[Feature]) -> None:
        """Undoes one `acquire` of the same features."""
        for site, wanted in self._by_site(features).items():
            self.banks[site].slots.release(wanted)

    def _by_site(self, features: Iterable[Feature]) -> dict[int, list[Feature]]:
        found: dict[int, list[Feature]] = {}
        for feature in features:
            if feature[0] in self:
                found.setdefault(self[feature[0]].site, []).append(feature)
        return found
