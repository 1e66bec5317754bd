"""`Active` on CUDA: entries in compressed rows, and the products with them as Triton kernels.

The buffers' length is fixed beforehand, so that the host never waits to learn how many entries there are.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from trainer.active_kernels import compress, dot, weighted_sum
from trainer.config import Precision
from trainer.product import rounded


class Compressed:
    """By token, members one after the other; past the last entry, `values` may be anything."""

    def __init__(self, places: "_Places", values: Tensor, precision: Precision) -> None:
        self._places = places
        self._precision: Precision = precision
        self.values = values

    @classmethod
    def at(cls, mask: Tensor, values: Tensor, most: int, precision: Precision = "float32") -> Self:
        """With room for `most` entries; if there are more, all of them become NaN."""
        places, entries = _Places.of(mask, values, most)
        return cls(places, entries, precision)

    def like(self, values: Tensor) -> Self:
        return type(self)(self._places, values, self._precision)

    def only(self, keep: Tensor) -> Self:
        places, values = self._places.only(keep, self.values)
        return type(self)(places, values, self._precision)

    def columns(self, first: int, last: int) -> Self:
        *_, features = self._places.shape
        column = self._places.key % features
        places, values = self._places.only((column >= first) & (column < last), self.values)
        return type(self)(places.narrowed(first, last), values, self._precision)

    def of_member(self, numbers: Tensor) -> Tensor:
        *_, features = self._places.shape
        return torch.nn.functional.pad(numbers, (0, 1)).index_select(
            0, self._places.key // features
        )

    def of_feature(self, numbers: Tensor) -> Tensor:
        return torch.nn.functional.pad(numbers.reshape(-1), (0, 1)).index_select(
            0, self._places.key
        )

    def decode(self, W: Tensor) -> Tensor:
        places = self._places
        return weighted_sum(self.values, places.key, None, places.ends, rounded(W, self._precision))

    def pull(self, g: Tensor, W: Tensor, plus: Tensor | None = None) -> Self:
        g, W = rounded(g, self._precision), rounded(W, self._precision)
        values = dot(self._places.key, self._places.ends, g, W)
        return self.like(values if plus is None else values + plus)

    def transposed(self, g: Tensor) -> Tensor:
        members, _, _ = self._places.shape
        order, ends = self._places.by_feature()
        g = rounded(g.expand(members, -1, -1), self._precision)
        return weighted_sum(self.values, self._places.row, order, ends, g)

    def sum_tokens(self) -> Tensor:
        members, tokens, _ = self._places.shape
        return self.transposed(self.values.new_ones(1).expand(members, tokens, 1)).squeeze(2)

    def count(self) -> Tensor:
        _, tokens, _ = self._places.shape
        return self._places.ends[::tokens].diff().to(self.values.dtype)

    def nth_largest(self, ranks: Sequence[int]) -> Tensor:
        member = self.of_member(torch.arange(len(ranks), device=self.values.device) + 1) - 1
        found = [
            self.values.masked_fill(member != number, float("-inf"))
            .topk(min(rank, len(self.values)), sorted=False)
            .values.min()
            for number, rank in enumerate(ranks)
        ]
        enough = [count >= rank for count, rank in zip(self.count(), ranks, strict=True)]
        return torch.where(torch.stack(enough), torch.stack(found), 0.0)

    def fired(self) -> Tensor:
        members, _, features = self._places.shape
        _, ends = self._places.by_feature()
        return (ends.diff() > 0).view(members, features)


class _Places:
    """Where entries are, and the order by feature that the transposed product wants."""

    def __init__(self, shape: torch.Size, ends: Tensor, key: Tensor, row: Tensor) -> None:
        self.shape = shape
        self.ends = ends
        """[members * tokens + 1]: where each row ends."""
        self.key = key
        """Of each entry member * features + feature; past the last, members * features."""
        self.row = row
        """Of each entry member * tokens + token."""
        self._by_feature: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, mask: Tensor, values: Tensor, most: int) -> tuple[Self, Tensor]:
        assert mask.numel() < 2**31
        ends = mask.sum(dim=2, dtype=torch.int32).flatten().cumsum(0, dtype=torch.int32)
        ends = torch.nn.functional.pad(ends, (1, 0))
        key, row, entries = compress(mask, values, ends, max(1, min(most, mask.numel())))
        return cls(mask.shape, ends, key, row), entries

    def only(self, keep: Tensor, values: Tensor) -> tuple[Self, Tensor]:
        """The places where `keep` is true, and `values` there; if not all had room, all of them as they are."""
        room = len(self.key)
        live = torch.arange(room, device=keep.device) < self.ends[-1]
        keep = live & (keep | (self.ends[-1] > room))
        before = torch.nn.functional.pad(keep.cumsum(0, dtype=torch.int32), (1, 0))
        # What is left out goes to a place past the end.
        place = torch.where(keep, before[:-1], room).long()

        def kept(part: Tensor, rest: int) -> Tensor:
            return part.new_full((room + 1,), rest).scatter_(0, place, part)[:-1]

        members, _, features = self.shape
        ends = before.index_select(0, self.ends.clamp(max=room))
        ends[-1] = torch.maximum(ends[-1], torch.where(self.ends[-1] > room, self.ends[-1], 0))
        key, row = kept(self.key, members * features), kept(self.row, 0)
        return type(self)(self.shape, ends, key, row), kept(values, 0)

    def narrowed(self, first: int, last: int) -> Self:
        """The same places, all of them in those features, counted from the first."""
        members, tokens, features = self.shape
        width = last - first
        member = self.key // features
        # Entries that had no room are NaN and stay, wherever they are.
        column = (self.key % features).clamp(first, last - 1) - first
        key = torch.where(member < members, member * width + column, members * width)
        return type(self)(torch.Size((members, tokens, width)), self.ends, key, self.row)

    def by_feature(self) -> tuple[Tensor, Tensor]:
        """The entries' order by feature, then token; and where each feature ends, [members * features + 1]."""
        if self._by_feature is None:
            members, _, features = self.shape
            keys, order = self.key.sort(stable=True)
            wanted = torch.arange(members * features + 1, dtype=torch.int32, device=self.key.device)
            self._by_feature = order, torch.searchsorted(keys, wanted, out_int32=True)
        return self._by_feature
