"""The engine's tests again, with vLLM in modes that it keeps for GPUs.

A mode must be chosen before vLLM is imported, so each has a pytest process of its own. See vllm_modes/sitecustomize.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(7200)]

HERE = Path(__file__).parent


def files(names: str) -> list[str]:
    return [f"tests/e2e/test_{name}.py" for name in names.split()]


# Triton's interpreter is slow: these are what a change of the runner or of the kernels would break first.
FIRST = ["-k", "hook[add] or tokens[short]"]
QUICK = ["-m", "not nightly"]
CHOSEN = [("v2,kernels", [*files("engine"), *FIRST])]
NIGHTLY = [
    ("piecewise,unsalted", ["tests/e2e/vllm_modes/stale_cache.py"]),
    ("async", files("engine property")),
    ("piecewise", files("compiled")),
    ("kernels", files("engine")),
    ("v2,async", files("engine")),
    ("v2", files("engine")),
    ("v2", files("parallel")),
    ("v2", files("around lora quantised")),
    ("v2", [*QUICK, *files("serve soak")]),
    ("v2", [*QUICK, *files("property")]),
    ("v2", files("loading server processes live")),
    ("v2", files("other_clients experiments trainer_served")),
    ("v2", [*files("families"), "-k", "every_stream"]),
    # What vLLM does on a GPU, but for CUDA graphs.
    ("v2,piecewise", [*QUICK, *files("compiled")]),
]


@pytest.mark.parametrize(
    ("modes", "tests"),
    [*CHOSEN, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)],
)
def test_the_engine_is_right_in_vllms_gpu_modes(modes: str, tests: list[str]) -> None:
    paths = [str(HERE / "vllm_modes"), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "STEER_TEST_VLLM": modes,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=3000"]

    finished = subprocess.run(
        [*command, "--durations=0", *tests],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    print(finished.stdout[-4000:])
    assert finished.returncode == 0, finished.stdout[-20_000:]
