"""Which activations two prompts differ in, against tables of all of them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from steer_server.api.differences import Activations, compare
from steer_server.dictionary.edits import Patch
from steer_server.generation import ActivationRows
from tests.unit.serving import INPUT_SCALE, N_FEATURES, NAME, small_dictionary

POSITIONS = 40


def table(seed: int) -> NDArray[np.float32]:
    """Activations of a prompt, [positions, features]: few, and of few values, so that some are equal in two prompts."""
    draw = np.random.default_rng(seed)
    values = draw.integers(1, 4, (POSITIONS, N_FEATURES)).astype(np.float32)
    return np.where(draw.random(values.shape) < 0.2, values, 0)


def read(f: NDArray[np.float32], parts: int = 2) -> Activations:
    """As it comes from the engine: a block for some of the features, the prompt in two chunks."""
    blocks = []
    for features in np.array_split(np.random.default_rng(0).permutation(N_FEATURES), parts):
        for positions in np.array_split(np.arange(POSITIONS), 2):
            rows, columns = f[np.ix_(positions, features)].nonzero()
            found = features[columns]
            splits = np.searchsorted(rows, np.arange(len(positions) + 1))
            numbers = (positions, splits, found)
            arrays = (array.astype(np.uint32) for array in numbers)
            values = f[positions[rows], found]
            blocks.append(ActivationRows(0, NAME, *arrays, values, None))
    return Activations.gather(blocks)


def test_the_differences_are_those_of_whole_tables() -> None:
    source, target = table(1), table(2)
    draw = np.random.default_rng(3)
    places = sorted(draw.permutation(POSITIONS)[:25].tolist())
    pairs = {place: int(draw.integers(POSITIONS)) for place in places}
    s, t = source[[pairs[place] for place in places]], target[places]

    found = compare(read(source), read(target), pairs)

    size = np.abs(s - t).max(axis=0)
    order = [i for i in np.argsort(-size, kind="stable").tolist() if size[i] > 0]
    assert found.features == order
    edits = found.edits(NAME, order[:3])
    assert list(edits) == order[:3]
    for feature, entry in edits.items():
        apart = np.flatnonzero(s[:, feature] != t[:, feature])
        values = tuple((places[row], float(s[row, feature])) for row in apart)
        assert entry.edit == Patch(feature, values)
        assert entry.scope.exclude_positions == frozenset()
    chosen = order[1:3]
    change = (s - t)[:, chosen] @ small_dictionary().dictionary.W_dec[chosen].numpy()
    lengths = np.linalg.norm(change / INPUT_SCALE, axis=1)
    assert found.norms(small_dictionary(), chosen) == pytest.approx(lengths[lengths > 0], rel=1e-5)


def test_equal_prompts_differ_in_nothing() -> None:
    f = read(table(1))

    found = compare(f, f, {place: place for place in range(POSITIONS)})

    assert (found.features, found.edits(NAME, [1])) == ([], {})
    assert len(found.norms(small_dictionary(), [])) == 0
