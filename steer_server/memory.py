"""How much memory a dictionary takes, and how much there is."""

from pathlib import Path

import torch

from steer_server.dictionary.card import Card
from steer_server.dictionary.files import WEIGHTS
from steer_server.errors import OutOfMemory

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def check_fits(folder: Path, card: Card, workers: int = 1, available: int | None = None) -> None:
    """OutOfMemory if the dictionary in `folder` does not fit the host; `available` bytes are free, by default as told.

    It is in memory here and in each of the engine's workers, as float32 whatever the file holds; an input scale makes
    rows of their own here. A worker lays the encoder out once more, and on an x86 CPU again, in oneDNN's order; elsewhere
    this asks for more than will be taken.
    """
    widening = 4 / getattr(torch, card.dtype).itemsize
    whole = int((folder / WEIGHTS).stat().st_size * widening)
    encoder = 4 * card.d_model * card.n_features
    needed = whole * (1 if card.input_scale == 1 else 2) + workers * (whole + 2 * encoder)
    free = available_bytes() if available is None else available
    if needed > free:
        raise OutOfMemory(
            f"dictionary {card.name!r} takes {needed >> 20} MiB of memory, {free >> 20} MiB are free; "
            "unload another one first",
            field="folder",
        )


def available_bytes() -> int:
    """What this process may still take, by the kernel's estimate and its control group's limit."""
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    host = int(fields["MemAvailable"].split()[0]) * 1024
    group = _group_bytes()
    return host if group is None else min(host, group)


def _group_bytes() -> int | None:
    """What the control group, as a container sees it, leaves; None: it sets no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()
        )
    except OSError:
        return None
    if limit == "max":
        return None
    # Pages of files that nobody has touched lately go when they are in the way.
    return max(0, int(limit) - used + int(statistics["inactive_file"]))
