"""How this process comes by the memory for what each step makes anew and throws away."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """From now on what is freed stays with the process, for the next step to take.

    glibc gives large blocks back to the system, which clears each page of them when it is touched again: most of the
    time of a pass over wide activations. It takes some steps until the process has room for all that a step makes, which
    is more than it holds at once. Where the C library is another one nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
