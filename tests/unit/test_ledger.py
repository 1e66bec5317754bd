"""Tallies of many steps, added up as wholes, are each request's own sums."""

from collections import defaultdict

import numpy as np

from steer_server.vllm_plugin.ledger import EditTally, Ledger
from steer_server.vllm_plugin.report import EditBlock, EditRows, EditRuns, StepReport


class Requests(dict[str, list[int]]):
    """[rows, changed, total size, largest size] by request, as they were told."""

    def enter(self, name: str, tally: EditTally) -> None:
        sums = self.setdefault(name, [0, 0, 0, 0])
        sums[0] += tally.rows
        sums[1] += sum(tally.changed)
        sums[2] += int(sum(tally.total_size))
        sums[3] = max(sums[3], *map(int, tally.max_size))


def report(step: int, names: list[str]) -> StepReport:
    """Each request has one run of two rows and as many edits as its place in the batch, and one."""
    n = len(names)
    entries = np.arange(1, n + 1, dtype=np.int32)
    edits = np.concatenate([np.arange(k) for k in entries]).astype(np.int32)
    of_request = np.arange(n, dtype=np.int32)
    runs = EditRuns(of_request, 0 * of_request, 0 * of_request + 2, entries, edits)
    numbers = (np.arange(len(edits)) + step) % 7
    sizes = numbers.astype(np.float32).tobytes()
    block = EditBlock(runs.pack(), numbers.astype(np.uint32).tobytes(), sizes, sizes)
    return StepReport(names, edits=[block])


def test_what_steps_add_up_to_is_what_each_request_had() -> None:
    found, expected = Requests(), defaultdict(lambda: [0, 0, 0, 0])
    ledger = Ledger(found.enter)
    for step in range(150):
        names = ["a", "b"] if step % 50 < 30 else ["b", "c", "a"]
        ledger.enter(StepReport.from_wire(report(step, names).to_wire()))
        first = 0
        for place, name in enumerate(names):
            numbers = [(i + step) % 7 for i in range(first, first + place + 1)]
            first += place + 1
            sums = expected[name]
            sums[0] += 2
            sums[1] += sum(numbers)
            sums[2] += sum(numbers)
            sums[3] = max(sums[3], *numbers)
    told = {name: list(sums) for name, sums in found.items()}
    ledger.settle()

    assert found == expected
    # A long generation does not pile its steps up until the end.
    assert told
    assert told != expected


def test_rows_add_up_to_what_a_block_of_them_says() -> None:
    names, edits = ["a", "b"], np.array([0, 1, 2, 0, 1, 2], np.int32)
    pair = np.array([0, 1], np.int32)
    runs = EditRuns(pair, 0 * pair, 0 * pair + 1, 0 * pair + 3, edits).pack()
    norms = np.array([[1, 2, 4], [2, 1, 1]], np.float32)
    of_rows, of_blocks = Requests(), Requests()
    ledgers = Ledger(of_rows.enter), Ledger(of_blocks.enter)
    for step in range(5):
        change = np.array([[0, -step, 8], [4, 0, -2 * step]], np.float32)
        x_norm = np.array([[2], [1]], np.float32)
        row = EditRows(runs, norms.tobytes(), change.tobytes(), x_norm.tobytes())
        size = np.abs(change) * norms / x_norm
        changed = (change != 0).astype(np.uint32).tobytes()
        block = EditBlock(runs, changed, size.tobytes(), size.tobytes())
        ledgers[0].enter(StepReport.from_wire(StepReport(names, edit_rows=[row]).to_wire()))
        ledgers[1].enter(StepReport(names, edits=[block]))
    for ledger in ledgers:
        ledger.settle()

    assert of_rows == of_blocks
    assert of_rows == {"a": [5, 9, 90, 16], "b": [5, 9, 60, 8]}


def test_nothing_is_handed_over_twice() -> None:
    found = Requests()
    ledger = Ledger(found.enter)
    ledger.enter(report(1, ["a"]))
    ledger.settle()
    ledger.settle()

    assert found["a"][0] == 2
