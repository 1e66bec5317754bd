"""What goes into vLLM and what comes out of it, in the terms of `generation`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason as VllmFinish

from steer_server.errors import EngineUnavailable
from steer_server.generation import (
    Finish,
    FinishReason,
    Generation,
    StepOutput,
)
from steer_server.program import Program
from steer_server.vllm_plugin import KEY
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.frontend import DISTRIBUTION, FORCED, LIVE


def parameters(generation: Generation) -> SamplingParams:
    """What vLLM draws by, with the program for the plugin."""
    sampling, program = generation.sampling, generation.program
    extra: dict[str, Any] | None = None
    if program != Program() or generation.live or sampling.distribution:
        extra = {
            KEY: program,
            LIVE: generation.live,
            FORCED: generation.forced,
            DISTRIBUTION: sampling.distribution,
        }
    logprobs = -1 if sampling.distribution else 0 if sampling.logprobs else None
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=list(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=0 if sampling.prompt_logprobs else None,
        extra_args=extra,
        output_kind=RequestOutputKind.DELTA,
    )


def step(output: Any, index: int, forced: int, account: Account | None) -> StepOutput:
    """vLLM's output, whose first token has that index, with what the account has received by now."""
    completion = output.outputs[0]
    token_ids = tuple(completion.token_ids)
    result = account.take() if account else None
    finish = None
    if output.finished:
        if completion.finish_reason == str(VllmFinish.ERROR):
            raise EngineUnavailable(
                "vLLM ended the generation with an error of its own; see its log"
            )
        reason = FinishReason(completion.finish_reason)
        reports = account.close() if account and reason is not FinishReason.ABORT else ()
        prompt_tokens = len(output.prompt_token_ids) - forced
        generated = index + len(token_ids)
        cached = output.num_cached_tokens or 0
        limited = account.limited_tokens if account else 0
        finish = Finish(reason, prompt_tokens, generated, cached, reports, limited)
    return StepOutput(
        index,
        token_ids,
        completion.text,
        _logprobs(completion.logprobs, token_ids),
        _logprobs(output.prompt_logprobs, output.prompt_token_ids),
        _distribution(account),
        tuple(result.rows) if result else (),
        account.applied(result) if account and result else (),
        output.num_cached_tokens or 0,
        result.encode_seconds if result else {},
        finish,
    )


def _logprobs(entries: Any, token_ids: Sequence[int]) -> tuple[float, ...]:
    """Of the tokens that vLLM has an entry for."""
    if not entries:
        return ()
    pairs = zip(entries, token_ids, strict=False)
    return tuple(entry[token].logprob for entry, token in pairs if entry)


def _distribution(account: Account | None) -> NDArray[np.float32] | None:
    if account is None or account.distribution is None:
        return None
    lists, account.distribution = account.distribution, None
    # The drawn token comes first, and once more in its place among all.
    ids, logprobs = lists.logprob_token_ids[0], lists.logprobs[0]
    found = np.full(len(ids) - 1, -np.inf, np.float32)
    found[ids] = logprobs
    return found
