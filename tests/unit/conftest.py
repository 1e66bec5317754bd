"""Where the Triton kernels can run."""

from collections.abc import Iterator

import pytest
import torch

from tests.unit import kernel_runs
from tests.unit.kernel_runs import Run


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Calls a function of `kernel_runs` where the kernels can run."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield lambda function, *arguments: function("cuda", *arguments)
        return
    with kernel_runs.process(interpret=True) as call:
        yield lambda function, *arguments: call(function, "cpu", *arguments)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tiny products slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
