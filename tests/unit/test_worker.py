"""What a worker refuses after vLLM has warmed its model up."""

from types import SimpleNamespace

import pytest
from vllm.config import CompilationMode

from steer_server.errors import EditNotApplied
from steer_server.vllm_plugin.worker import SteerWorker


class Vllm:
    def compile_or_warm_up_model(self) -> float:
        return 1.5


class Worker(SteerWorker, Vllm):
    def __init__(self, mode: CompilationMode, op_calls: list[int], device: str = "cpu") -> None:
        self.device = SimpleNamespace(type=device)
        self.model_config = SimpleNamespace(enforce_eager=False)
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(mode=mode))
        self.steer_sites = [0, 2]
        self.steer = SimpleNamespace(op_calls=op_calls)


@pytest.mark.parametrize(
    ("mode", "device"),
    [
        (CompilationMode.VLLM_COMPILE, "cuda"),
        (CompilationMode.DYNAMO_TRACE_ONCE, "cpu"),
        # There it is warmed up whatever is compiled.
        (CompilationMode.NONE, "cuda"),
    ],
)
def test_a_model_that_never_called_the_op_at_a_site_of_this_process_is_refused(
    mode: CompilationMode, device: str
) -> None:
    with pytest.raises(EditNotApplied, match="never called the op of site number 2"):
        Worker(mode, [1, 1, 0], device).compile_or_warm_up_model()


@pytest.mark.parametrize(
    ("mode", "op_calls"),
    [(CompilationMode.DYNAMO_TRACE_ONCE, [1, 0, 1]), (CompilationMode.NONE, [0, 0, 0])],
)
def test_one_that_called_it_and_one_that_was_not_warmed_up_pass(
    mode: CompilationMode, op_calls: list[int]
) -> None:
    assert Worker(mode, op_calls).compile_or_warm_up_model() == 1.5
