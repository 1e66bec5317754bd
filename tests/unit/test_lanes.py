"""The end-to-end tests are divided among processes, and none is left out."""

from pathlib import Path

import pytest

from tests.e2e.lanes import SECONDS, SHARED, USUAL, lanes, parse

MODULES = {path.stem for path in (Path(__file__).parents[1] / "e2e").glob("test_*.py")}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_group_is_in_one_lane_and_lanes_take_about_as_long(count: int):
    groups = {SHARED, "something new", *MODULES}

    found = lanes(groups, count)

    assert sorted(group for lane in found for group in lane) == sorted(groups)
    loads = [sum(SECONDS.get(group, USUAL) for group in lane) for lane in found]
    assert max(loads) - min(loads) <= USUAL


def test_the_times_are_of_modules_that_exist():
    assert SECONDS.keys() - {SHARED} <= MODULES


def test_a_lane_is_written_as_its_number_of_so_many():
    assert [parse(text) for text in ("1/1", "2/2", "1/3")] == [(0, 1), (1, 2), (0, 3)]
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(ValueError, match=r"not a lane|invalid literal"):
            parse(wrong)
