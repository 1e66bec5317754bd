"""The listing of strongest features against numpy's sort of whole rows."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from steer_server.vllm_plugin.strongest import strongest


def by_sorting(row: NDArray, threshold: NDArray, above: float, limit: int):
    order = np.argsort(-row, kind="stable")
    wanted = (row > threshold) & (row > above)
    features = order[wanted[order]][:limit]
    return features, row[features], int((row > threshold).sum())


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    width=st.integers(1, 200),
    level=st.sampled_from([-3.0, 0.0, 1.0, 3.0]),
    levels=st.sampled_from([3, 1_000_000]),
)
@example(seed=1, rows=5, width=200, level=1.0, levels=1_000_000)
@example(seed=1, rows=5, width=200, level=1.0, levels=3)
def test_it_lists_what_sorting_whole_rows_does(
    seed: int, rows: int, width: int, level: float, levels: int
):
    numbers = np.random.default_rng(seed)
    # Few levels make equal values.
    z = (numbers.integers(-levels, levels, (rows, width)) / levels + level).astype(np.float32)
    threshold = np.abs(numbers.normal(0, 0.5, width)).astype(np.float32)
    above = numbers.choice([0.0, 0.5, 2.0], rows)
    limit = numbers.integers(1, width + 1, rows)

    counts, features, values, active = strongest(z, threshold, above, limit)

    stops = np.cumsum(counts)
    for row, stop in enumerate(stops):
        listed = slice(stop - counts[row], stop)
        expected = by_sorting(z[row], threshold, above[row], limit[row])
        assert_array_equal(features[listed], expected[0])
        assert_array_equal(values[listed], expected[1])
        assert active[row] == expected[2]
    assert stops[-1] == len(features) == len(values)


@pytest.mark.parametrize("number", [np.nan, -np.inf, 0.0])
def test_what_does_not_pass_is_not_listed(number: float):
    z = np.array([[number, 2.0, number, 1.0]], np.float32)

    counts, features, _, active = strongest(z, np.zeros(4, np.float32), np.zeros(1), np.full(1, 4))

    assert (counts[0], active[0], features.tolist()) == (2, 2, [1, 3])
