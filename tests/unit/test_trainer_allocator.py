"""Memory that a step has freed is there for the next one, without asking the system."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
{call}
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from trainer.allocator import keep_freed_memory; keep_freed_memory()"
PAGES = 20 * 80_000_000 // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_after_some_steps_blocks_of_the_size_of_freed_ones_touch_no_new_pages() -> None:
    def faults(call: str) -> int:
        command = [sys.executable, "-c", FAULTS.format(call=call)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("") > PAGES // 2, "nothing to win on this system"
    assert faults(KEEP) < PAGES // 100
