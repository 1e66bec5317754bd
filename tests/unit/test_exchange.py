"""What vLLM's outputs become."""

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine import FinishReason as VllmFinish

from steer_server.errors import EngineUnavailable
from steer_server.generation import FinishReason
from steer_server.vllm_plugin import exchange


def ended(reason: VllmFinish) -> RequestOutput:
    completion = CompletionOutput(0, "a", [7], None, None, finish_reason=str(reason))
    return RequestOutput("r", None, [5, 6], None, [completion], finished=True)


@pytest.mark.parametrize("reason", [VllmFinish.STOP, VllmFinish.LENGTH, VllmFinish.ABORT])
def test_an_end_has_vllms_reason(reason: VllmFinish) -> None:
    finish = exchange.step(ended(reason), 3, 0, None).finish

    assert finish is not None
    assert finish.reason is FinishReason(str(reason))
    assert (finish.prompt_tokens, finish.generated_tokens) == (2, 4)


def test_an_error_of_vllms_is_one_of_the_engine() -> None:
    with pytest.raises(EngineUnavailable, match="vLLM ended the generation"):
        exchange.step(ended(VllmFinish.ERROR), 0, 0, None)
