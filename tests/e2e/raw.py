"""Requests with what vLLM can and `Sampling` cannot: n, structured outputs, LoRA, prompt log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind

from steer_server.engine import VllmEngine
from steer_server.generation import EditReport
from steer_server.program import Program
from steer_server.vllm_plugin import KEY


@dataclass(frozen=True)
class RawOutcome:
    output: RequestOutput
    reports: list[tuple[EditReport, ...]]
    """Of each sequence."""

    @property
    def text(self) -> str:
        return self.output.outputs[0].text

    @property
    def logprobs(self) -> list[float]:
        """Of the first sequence's tokens."""
        first = self.output.outputs[0]
        pairs = zip(first.logprobs or (), first.token_ids, strict=True)
        return [entry[token].logprob for entry, token in pairs]

    @property
    def token_ids(self) -> list[list[int]]:
        return [list(sequence.token_ids) for sequence in self.output.outputs]


async def run_raw(
    engine: VllmEngine,
    name: str,
    prompt: Sequence[int],
    program: Program = Program(),  # noqa: B008 - frozen
    lora: Any = None,
    **sampling: Any,
) -> RawOutcome:
    """Greedy unless `sampling`, fields of vLLM's SamplingParams, says otherwise. The one place that knows the engine's insides."""
    fields = {"temperature": 0.0, "max_tokens": 16, "logprobs": 0} | sampling
    extra = {KEY: program} if program != Program() else None
    parameters = SamplingParams(
        **fields, extra_args=extra, output_kind=RequestOutputKind.FINAL_ONLY
    )
    inputs = TokensPrompt(prompt_token_ids=list(prompt))
    stream = engine._llm.generate(inputs, parameters, name, lora_request=lora)
    (output,) = [output async for output in stream]
    reports = []
    for index in range(len(output.outputs)):
        account = engine._frontend.account(name, index)
        if account is not None:
            account.take()
            reports.append(account.close())
    return RawOutcome(output, reports)
