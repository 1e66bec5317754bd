"""Lists the strongest features of rows that are mostly inactive, in one pass over them on the CPU.

torch finds the largest of a row by sorting all of it, and takes a pass each to zero, count and list; here what does not
pass its threshold is looked at once, vectorised. Importing this compiles it, which takes a second.
"""

import numba
import numpy as np

_FEW = 128
"""Keys up to which comparing each with all takes less than finding those that need not be compared."""


@numba.njit("void(i8[::1], i8)")
def _select(keys, k):
    """Brings the `k` largest to the front, in any order (Hoare's quickselect)."""
    first, last = 0, len(keys) - 1
    while first < last:
        pivot = keys[(first + last) // 2]
        i, j = first, last
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k <= j:
            last = j
        elif k > i:
            first = i
        else:
            return


@numba.njit("void(i8[::1], i8[::1])")
def _rank(keys, ranked):
    """Distinct keys, the largest first, into `ranked`. Nothing branches, and the comparisons are vectorised."""
    for i in range(len(keys)):
        larger = np.uint64(0)
        for j in range(len(keys)):
            larger += np.uint64(keys[j] > keys[i])
        ranked[larger] = keys[i]


# Numbers without a sign, because an index that may be negative is checked for that each time.
@numba.njit("u8(u1[::1], u4[::1], u4[::1])")
def _list_set(flags, eights, places):
    """Where the flags, 0 or 1, are set, into `places`; returns how many. `eights` has room for each eight of them.

    Nothing branches on a flag, which no processor could foresee: a place is written in any case, and the next one over it
    unless it counts. Both lists have room for one more.
    """
    together = flags.view(np.uint64)
    n_eights = np.uint64(0)
    for eight in range(len(together)):
        eights[n_eights] = eight
        n_eights += np.uint64(together[eight] != 0)
    n = np.uint64(0)
    for i in range(n_eights):
        first = np.uint64(8) * np.uint64(eights[i])
        for place in range(first, first + np.uint64(8)):
            places[n] = place
            n += np.uint64(flags[place])
    return n


@numba.njit(
    "Tuple((u4[::1], u4[::1], f4[::1], u4[::1]))(f4[:, ::1], f4[::1], f8[::1], i8[::1])", nogil=True
)
def strongest(z, threshold, above, limit):
    """Of each row of `z` at most `limit` features that pass `threshold`, which is 0 or more, and `above`.

    `z` is [rows, features], `threshold` [features], `above` and `limit` [rows]. What is no number passes nothing. Returns
    how many are listed of each row; the features and their values, row after row, strongest first and of equals the lower
    feature first; and how many pass the threshold in each row, listed or not.
    """
    n_rows, width = z.shape
    room = limit.sum()
    features, values = np.empty(room, np.uint32), np.empty(room, np.uint32)
    counts, active = np.empty(n_rows, np.uint32), np.empty(n_rows, np.uint32)
    passes = np.zeros((width + 7) // 8 * 8, np.uint8)
    eights, found = np.empty(width // 8 + 2, np.uint32), np.empty(width + 1, np.uint32)
    # A value and its feature's complement in one number, larger where stronger: the bits of positive floats are in order.
    keys, ranked = np.empty(width + 1, np.int64), np.empty(width + 1, np.int64)
    bits = z.view(np.uint32)
    stop = 0
    for row in range(n_rows):
        for feature in range(width):
            passes[feature] = z[row, feature] > threshold[feature]
        n_active = _list_set(passes, eights, found)
        n = np.uint64(0)
        for i in range(n_active):
            feature = np.uint64(found[i])
            keys[n] = np.int64(bits[row, feature]) << 32 | np.int64(~found[i])
            n += np.uint64(z[row, feature] > above[row])
        size = min(np.int64(n), limit[row])
        if n > _FEW:
            _select(keys[:n], size)
            n = np.uint64(size)
        if n > _FEW:
            ranked[:n] = np.sort(keys[:n])[::-1]
        else:
            _rank(keys[:n], ranked)
        for i in range(size):
            features[stop + i] = np.uint32(~ranked[i])
            values[stop + i] = np.uint32(ranked[i] >> 32)
        counts[row], active[row] = size, n_active
        stop += size
    return counts, features[:stop], values[:stop].view(np.float32), active
