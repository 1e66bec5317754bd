"""Finding the largest of many numbers, in as few passes over them as it takes."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GROUPS = 2
"""Groups for each number sought."""


def nonzero(mask: Bool[Tensor, "..."]) -> Int[Tensor, " entries"]:
    """Where the mask is true, counted through all of it; looks at eight places at once where it can."""
    flat = mask.reshape(-1)
    if len(flat) % 8:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64)
    some = words.nonzero().squeeze(1)
    inside = words[some].view(torch.bool).nonzero().squeeze(1)
    return some.index_select(0, inside >> 3) * 8 + (inside & 7)


def nth_largest(lists: Sequence[Float[Tensor, " _"]], ranks: Sequence[int]) -> Float[Tensor, " _"]:
    """Of each list the number of that rank, 1 being the largest; 0 where the list is shorter."""
    found = [
        values.kthvalue(len(values) - rank + 1).values
        if len(values) >= rank
        else values.new_zeros(())
        for values, rank in zip(lists, ranks, strict=True)
    ]
    return torch.stack(found)


def largest_of_all(
    z: Float[Tensor, "members tokens features"], ranks: Sequence[int]
) -> Float[Tensor, " members"]:
    """Of each member's numbers above 0 the one of that rank; 0 where there are fewer. Waits for no device."""
    found = [
        own.topk(min(rank, len(own)), sorted=False).values.min()
        for own, rank in zip(z.flatten(1), ranks, strict=True)
    ]
    return torch.stack(found).clamp(min=0.0)


def top_k(
    z: Float[Tensor, "members tokens features"], k: int
) -> tuple[Float[Tensor, "members tokens k"], Int[Tensor, "members tokens k"]]:
    """The k largest of each row, largest first, and their columns: torch's topk, but faster on a CPU where k is small.

    The k-th largest of the maxima of groups of columns is no more than the k-th largest of all, and few numbers are
    above it.
    """
    features = z.shape[2]
    group = features // (_GROUPS * k)
    if z.is_cuda or group < 4:
        best = z.topk(k, dim=2)
        return best.values, best.indices
    rows = z.reshape(-1, features)
    grouped = rows[:, : features - features % group].unflatten(1, (-1, group))
    bound = grouped.amax(dim=2).topk(k, dim=1).values[:, -1:]
    # What is no number is not below it, and is found too.
    flat = nonzero((rows < bound).logical_not_())
    row = flat // features
    counts = torch.bincount(row, minlength=len(rows))
    place = torch.arange(len(flat)) - (counts.cumsum(dim=0) - counts).index_select(0, row)
    few = (len(rows), int(counts.max()))
    values = rows.new_full(few, -torch.inf).index_put_(
        (row, place), rows.reshape(-1).index_select(0, flat)
    )
    columns = flat.new_zeros(few).index_put_((row, place), flat - row * features)
    best = values.topk(k, dim=1)
    shape = (*z.shape[:2], k)
    return best.values.view(shape), columns.gather(1, best.indices).view(shape)
