"""Lists the strongest features of rows that are mostly inactive, in one pass over them on the CPU.

torch finds the largest of a row by sorting all of it, and takes a pass each to zero, count and list; here what does not
pass its threshold is looked at once, vectorised. Importing this compiles it, which takes a second.
"""

import numba
import numpy as np


@numba.njit("b1(f4[::1], u4[::1], i8, i8)")
def _weaker(values, features, i, j):
    return values[i] < values[j] or (values[i] == values[j] and features[i] > features[j])


@numba.njit("void(f4[::1], u4[::1], i8)")
def _sink(values, features, i):
    """Makes a heap with the weakest on top of one that is a heap below `i`."""
    while 2 * i + 1 < len(values):
        child = 2 * i + 1
        if child + 1 < len(values) and _weaker(values, features, child + 1, child):
            child += 1
        if _weaker(values, features, i, child):
            return
        values[i], values[child] = values[child], values[i]
        features[i], features[child] = features[child], features[i]
        i = child


@numba.njit("void(f4[::1], u4[::1])")
def _heapify(values, features):
    for i in range(len(values) // 2 - 1, -1, -1):
        _sink(values, features, i)


@numba.njit("i8(f4[::1], u4[::1], i8, f4, i8)")
def _offer(values, features, size, value, feature):
    """Takes one more of ascending features in among `size` others if it is one of the strongest; how many there are then."""
    if size < len(values):
        values[size], features[size] = value, feature
        if size + 1 == len(values):
            _heapify(values, features)
        return size + 1
    if value > values[0]:
        values[0], features[0] = value, feature
        _sink(values, features, 0)
    return size


@numba.njit("void(f4[::1], u4[::1])")
def _sort_heap(values, features):
    for last in range(len(values) - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        features[0], features[last] = features[last], features[0]
        _sink(values[:last], features[:last], 0)


@numba.njit(
    "Tuple((u4[::1], u4[::1], f4[::1], u4[::1]))(f4[:, ::1], f4[::1], f8[::1], i8[::1])", nogil=True
)
def strongest(z, threshold, above, limit):
    """Of each row of `z` at most `limit` features that pass `threshold` and `above`.

    `z` is [rows, features], `threshold` [features], `above` and `limit` [rows]. What is no number passes nothing. Returns
    how many are listed of each row; the features and their values, row after row, strongest first and of equals the lower
    feature first; and how many pass the threshold in each row, listed or not.
    """
    n_rows, width = z.shape
    room = limit.sum()
    features, values = np.empty(room, np.uint32), np.empty(room, np.float32)
    counts, active = np.empty(n_rows, np.uint32), np.empty(n_rows, np.uint32)
    passes = np.zeros((width + 7) // 8 * 8, np.bool_)
    eights = passes.view(np.uint64)
    stop = 0
    for row in range(n_rows):
        for feature in range(width):
            passes[feature] = z[row, feature] > threshold[feature]
        best, whose = values[stop : stop + limit[row]], features[stop : stop + limit[row]]
        size, active[row] = 0, 0
        for eight in range(len(eights)):
            if not eights[eight]:
                continue
            for feature in range(8 * eight, 8 * eight + 8):
                if not passes[feature]:
                    continue
                active[row] += 1
                if z[row, feature] > above[row]:
                    size = _offer(best, whose, size, z[row, feature], feature)
        best, whose = best[:size], whose[:size]
        if size < limit[row]:
            _heapify(best, whose)
        _sort_heap(best, whose)
        counts[row] = size
        stop += size
    return counts, features[:stop], values[:stop], active
