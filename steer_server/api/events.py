"""What the engine gives, from domain to proto."""

from collections.abc import Sequence

from steer.v1 import activations_pb2, edits_pb2, prompt_pb2, steering_pb2

from steer_server.api.edits import write_edits
from steer_server.api.wire import ResolvedRequest
from steer_server.generation import ActivationRows, Finish, FinishReason, StepOutput, Tokenizer

_REASONS = {
    FinishReason.STOP: steering_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: steering_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: steering_pb2.FINISH_REASON_ABORT,
}


def started(
    request_id: str, request: ResolvedRequest, tokenizer: Tokenizer
) -> steering_pb2.Started:
    return steering_pb2.Started(
        request_id=request_id,
        prompt=prompt_tokens(request.prompt_token_ids, tokenizer),
        edits=write_edits(request.program.edits),
        max_tokens=request.sampling.max_tokens,
    )


def prompt_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> prompt_pb2.PromptTokens:
    return prompt_pb2.PromptTokens(ids=ids, pieces=tokenizer.pieces(ids))


def tokens(output: StepOutput) -> steering_pb2.Tokens | None:
    """The tokens and activations of `output`; None if it has neither."""
    if not (output.token_ids or output.text or output.activations):
        return None
    return steering_pb2.Tokens(
        first_index=output.first_index,
        ids=output.token_ids,
        text=output.text,
        logprobs=output.logprobs,
        activations=[sparse(rows) for rows in output.activations],
    )


def sparse(rows: ActivationRows) -> activations_pb2.SparseActivations:
    return activations_pb2.SparseActivations(
        read_out=rows.read_out,
        dictionary=rows.dictionary,
        position=rows.positions.tolist(),
        row_splits=rows.row_splits.tolist(),
        feature=rows.features.tolist(),
        value=rows.values.tolist(),
        active=[] if rows.active is None else rows.active.tolist(),
    )


def finished(finish: Finish) -> steering_pb2.Finished:
    return steering_pb2.Finished(
        reason=_REASONS[finish.reason],
        usage=steering_pb2.Usage(
            prompt_tokens=finish.prompt_tokens,
            generated_tokens=finish.generated_tokens,
            cached_tokens=finish.cached_tokens,
        ),
        edit_reports=[
            edits_pb2.EditReport(
                revision=report.revision,
                edit=report.edit,
                tokens_in_scope=report.tokens_in_scope,
                tokens_changed=report.tokens_changed,
                mean_relative_size=report.mean_relative_size,
                max_relative_size=report.max_relative_size,
            )
            for report in finish.reports
        ],
    )
