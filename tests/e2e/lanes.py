"""Divides the end-to-end tests among processes, so that no engine is started twice."""

from collections.abc import Iterable

SHARED = "engine"
"""The group of the tests that ask the engine which most modules share; each other module is a group of its own."""

SECONDS = {
    SHARED: 225,
    "test_paper": 180,
    "test_serve": 85,
    "test_compiled": 130,
    "test_vllm_modes": 90,
    "test_parallel": 75,
    "test_lora": 35,
    "test_server": 25,
}
"""Of CPU that a group takes, starts of engines included, where that is not about `USUAL`."""
USUAL = 60


def lanes(groups: Iterable[str], count: int) -> list[set[str]]:
    """The groups of each of `count` processes, which take about as long."""
    found: list[set[str]] = [set() for _ in range(count)]
    loads = [0] * count
    for group in sorted(groups, key=lambda group: (-SECONDS.get(group, USUAL), group)):
        least = loads.index(min(loads))
        found[least].add(group)
        loads[least] += SECONDS.get(group, USUAL)
    return found


def parse(text: str) -> tuple[int, int]:
    """Index and count of `1/2`; ValueError if it is not that."""
    number, _, count = text.partition("/")
    if not 1 <= int(number) <= int(count):
        raise ValueError(f"{text!r} is not a lane such as 1/2")
    return int(number) - 1, int(count)
