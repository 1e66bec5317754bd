"""What the engine gives, from domain to proto."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from steer.v1 import activations_pb2, edits_pb2, prompt_pb2, steering_pb2

from steer_server.api.edits import write_edits
from steer_server.api.read_outs import write_read_outs
from steer_server.api.wire import ResolvedRequest
from steer_server.generation import (
    ActivationRows,
    EditReport,
    Finish,
    FinishReason,
    StepOutput,
    Tokenizer,
)

# Rows and activations of one message, some 10 bytes each: far below the 16 MiB a message may have.
_ENTRIES_PER_MESSAGE = 1 << 16

_REASONS = {
    FinishReason.STOP: steering_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: steering_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: steering_pb2.FINISH_REASON_ABORT,
    FinishReason.FEATURE: steering_pb2.FINISH_REASON_FEATURE,
}


def started(
    request_id: str, request: ResolvedRequest, tokenizer: Tokenizer
) -> steering_pb2.Started:
    return steering_pb2.Started(
        request_id=request_id,
        prompt=prompt_tokens(request.prompt_token_ids, tokenizer),
        edits=write_edits(request.program.edits),
        max_tokens=request.sampling.max_tokens,
        sampling=_sampling(request),
        read_outs=write_read_outs(request.program.read_outs),
    )


def _sampling(request: ResolvedRequest) -> steering_pb2.Sampling:
    sampling = request.sampling
    return steering_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        n=request.n,
    )


def prompt_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> prompt_pb2.PromptTokens:
    return prompt_pb2.PromptTokens(ids=ids, pieces=tokenizer.pieces(ids))


class _Carrier(Protocol):
    """A response with a field for tokens."""

    @property
    def tokens(self) -> steering_pb2.Tokens: ...


_C = TypeVar("_C", bound=_Carrier)


def tokens(
    make: Callable[[], _C], output: StepOutput, revision: int = 0, sequence: int = 0
) -> Iterator[_C]:
    """The tokens and activations of `output`, in as many of the responses that `make` makes as their size asks for.

    Filled where they are: putting a message into another one copies it by way of bytes, as long as all the rest.
    """
    *before, last = batches(output.activations) or [[]]
    for batch in before:
        response = make()
        _fill(response.tokens, output, revision, sequence)
        write_rows(response.tokens.activations, batch)
        yield response
    if output.token_ids or output.text or last:
        response = make()
        message = response.tokens
        _fill(message, output, revision, sequence)
        message.ids.extend(output.token_ids)
        message.text = output.text
        message.logprobs.extend(output.logprobs)
        write_rows(message.activations, last)
        yield response


def _fill(message: steering_pb2.Tokens, output: StepOutput, revision: int, sequence: int) -> None:
    message.first_index = output.first_index
    message.sequence = sequence
    message.revision = revision


Batch = list[tuple[ActivationRows, int, int]]
"""Rows [first, last) of each."""


def batches(activations: Sequence[ActivationRows]) -> list[Batch]:
    """The rows in their order, cut so that no batch outgrows a message."""
    found: list[Batch] = []
    room = 0
    for rows in activations:
        first, count = 0, len(rows.positions)
        while first < count:
            if room <= 0:
                found.append([])
                room = _ENTRIES_PER_MESSAGE
            last = _last(rows, first, room)
            found[-1].append((rows, first, last))
            room -= _entries(rows, first, last)
            first = last
    return found


def write_rows(
    into: RepeatedCompositeFieldContainer[activations_pb2.SparseActivations], batch: Batch
) -> None:
    """Adds a message for each part of the batch to the field `into`."""
    for rows, first, last in batch:
        splits = rows.row_splits[first : last + 1].tolist()
        begin, end = splits[0], splits[-1]
        into.add(
            read_out=rows.read_out,
            dictionary=rows.dictionary,
            position=rows.positions[first:last].tolist(),
            row_splits=[split - begin for split in splits] if begin else splits,
            feature=rows.features[begin:end].tolist(),
            value=rows.values[begin:end].tolist(),
            active=[] if rows.active is None else rows.active[first:last].tolist(),
        )


def _last(rows: ActivationRows, first: int, room: int) -> int:
    """The end of the rows from `first` on that have room; of one at least."""
    count = len(rows.positions)
    if _entries(rows, first, count) <= room:
        return count
    fits = int(rows.row_splits.searchsorted(rows.row_splits[first] + room, "right")) - 1
    return min(max(fits, first + 1), first + room, count)


def _entries(rows: ActivationRows, first: int, last: int) -> int:
    """Rows and activations."""
    return last - first + int(rows.row_splits[last]) - int(rows.row_splits[first])


def finished(finish: Finish, sequence: int = 0) -> steering_pb2.Finished:
    return steering_pb2.Finished(
        reason=_REASONS[finish.reason],
        usage=steering_pb2.Usage(
            prompt_tokens=finish.prompt_tokens,
            generated_tokens=finish.generated_tokens,
            cached_tokens=finish.cached_tokens,
        ),
        edit_reports=edit_reports(finish.reports),
        sequence=sequence,
        warnings=_warnings(finish),
        stopped_by=finish.stopped_by,
    )


def _warnings(finish: Finish) -> list[str]:
    if not finish.limited_tokens:
        return []
    return [f"the edits were past their size limit on {finish.limited_tokens} tokens"]


def edit_reports(reports: Sequence[EditReport]) -> list[edits_pb2.EditReport]:
    return [
        edits_pb2.EditReport(
            revision=report.revision,
            edit=report.edit,
            tokens_in_scope=report.tokens_in_scope,
            tokens_changed=report.tokens_changed,
            mean_relative_size=report.mean_relative_size,
            max_relative_size=report.max_relative_size,
        )
        for report in reports
    ]
