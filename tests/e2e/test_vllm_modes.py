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
ENGINE, AROUND, LORA, SERVE, SOAK, PARALLEL, COMPILED, PROPERTY = (
    f"tests/e2e/test_{name}.py"
    for name in "engine around lora serve soak parallel compiled property".split()
)

# Triton's interpreter is slow: these are what a change of the runner or of the kernels would break first.
V2 = "hook[add] or tokens[short]"
QUICK = ["-m", "not nightly"]


@pytest.mark.parametrize(
    ("modes", "tests"),
    [
        ("v2,kernels", [ENGINE, "-k", V2]),
        pytest.param(
            "piecewise,unsalted",
            ["tests/e2e/vllm_modes/stale_cache.py"],
            marks=pytest.mark.nightly,
        ),
        pytest.param("async", [ENGINE, PROPERTY], marks=pytest.mark.nightly),
        pytest.param("piecewise", [COMPILED], marks=pytest.mark.nightly),
        pytest.param("v2,async", [ENGINE], marks=pytest.mark.nightly),
        pytest.param("kernels", [ENGINE], marks=pytest.mark.nightly),
        pytest.param("v2", [ENGINE], marks=pytest.mark.nightly),
        pytest.param("v2", [PARALLEL], marks=pytest.mark.nightly),
        pytest.param("v2", [AROUND, LORA], marks=pytest.mark.nightly),
        pytest.param("v2", [*QUICK, SERVE, SOAK], marks=pytest.mark.nightly),
        pytest.param("v2", [*QUICK, PROPERTY], marks=pytest.mark.nightly),
    ],
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
