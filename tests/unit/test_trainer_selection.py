import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.selection import largest_of_all, nonzero, nth_largest, top_k


@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 5, 7), (1, 1, 8), (3, 2, 0)])
def test_nonzero_finds_every_place_in_order(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3

    found = nonzero(mask)

    assert torch.equal(found, mask.reshape(-1).nonzero().squeeze(1))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from([(64, 4), (65, 3), (257, 32), (40, 9), (12, 12)]))
def test_top_k_is_torchs(seed: int, size: tuple[int, int]) -> None:
    features, k = size
    z = torch.randn(2, 7, features, generator=torch.Generator().manual_seed(seed))
    z[0, 1] = -3.0
    z[1, 2, :5] += 10

    values, columns = top_k(z, k)

    assert torch.equal(values, z.topk(k, dim=2).values)
    assert torch.equal(z.gather(2, columns), values)
    assert all(len(row.unique()) == k for row in columns.flatten(0, 1))


def test_nth_largest_is_by_list_and_0_where_there_are_too_few() -> None:
    lists = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([5.0]), torch.tensor([])]

    found = nth_largest(lists, [2, 2, 1])

    assert found.tolist() == [2.0, 0.0, 0.0]


def test_the_largest_of_all_is_by_member_and_0_where_too_few_are_above() -> None:
    z = torch.tensor([[[3.0, -1.0], [2.0, 3.0]], [[-1.0, -2.0], [5.0, -4.0]]])

    assert largest_of_all(z, [2, 1]).tolist() == [3.0, 5.0]
    assert largest_of_all(z, [3, 2]).tolist() == [2.0, 0.0]
    assert largest_of_all(z, [9, 9]).tolist() == [0.0, 0.0]


def test_what_is_no_number_is_among_the_largest() -> None:
    z = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    z[0, 1] = torch.nan

    values, _ = top_k(z, 4)

    assert values[0, 1].isnan().all()
    assert torch.equal(values[0, ::2], z[0, ::2].topk(4).values)
