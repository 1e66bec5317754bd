"""What a worker hands to the scheduler, whichever model runner made it."""

import pytest
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from steer_server.vllm_plugin.runner import with_reports


class Promise(AsyncModelRunnerOutput):
    def __init__(self) -> None:
        self.output: ModelRunnerOutput | None = ModelRunnerOutput(["a"], {"a": 0})

    def get_output(self) -> ModelRunnerOutput:
        assert self.output is not None, "vLLM's promises are kept once"
        output, self.output = self.output, None
        return output


@pytest.mark.parametrize("promised", [False, True])
def test_reports_arrive_with_the_output_that_the_runner_made_or_promised(promised: bool) -> None:
    output = Promise() if promised else ModelRunnerOutput(["a"], {"a": 0})

    carried = with_reports(output, lambda: [1])

    assert isinstance(carried, AsyncModelRunnerOutput) is promised
    arrived = carried.get_output() if promised else carried
    assert arrived.req_ids == ["a"]
    assert arrived.steer == [1]
