"""What plain vLLM's front-end does for programs: starts engines with sites, admits, proves, answers."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.v1.engine import FinishReason
from vllm.v1.engine.async_llm import InputStreamError
from vllm.v1.engine.output_processor import OutputProcessor

from steer_server import __version__
from steer_server.dictionary.card import model_shape
from steer_server.dictionary.files import check_model, check_served, load
from steer_server.errors import AnswerTooLarge, InvalidRequest, SteerError, UnsupportedVllm
from steer_server.generation import ActivationRows
from steer_server.vllm_plugin import KEY, WORKERS, endpoints, offline
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.frontend import Frontend, attach
from steer_server.vllm_plugin.plugin import SLOTS
from steer_server.vllm_plugin.support import check_supported

DEFAULT_SLOTS = 1024
MAX_ENTRIES = 2**21
"""Rows and activations of the answer of a server to a request, which is made whole, and of JSON."""

_next: list[Callable[[Any], None]] = []
"""At most one: what is to be done to the next OutputProcessor."""


def prepare(arguments: Any, create: Callable[[], Any], folders: Mapping[str, str]) -> Any:
    """The config that `create` makes of `arguments`, for an engine with the dictionaries in `folders` resident.

    The next OutputProcessor of this process belongs to it. Without dictionaries it refuses every program.
    """
    if envs.VLLM_USE_RUST_FRONTEND:
        raise UnsupportedVllm(
            "requests to vLLM's Rust front-end pass steer by, and their edits would not be applied; "
            "unset VLLM_USE_RUST_FRONTEND, or set STEER_DISABLE=1"
        )
    if not folders:
        config = create()
        endpoints.guard()
        _attach_to_next(_refuse_programs)
        return config
    stored = {name: load(Path(folder)) for name, folder in folders.items()}
    for entry in stored.values():
        check_served(entry.card)
    sites = sorted({entry.card.site for entry in stored.values()})
    slots = int(os.environ.get(SLOTS, DEFAULT_SLOTS))
    worker = WORKERS.get(current_platform.device_type)
    if worker is None:
        raise UnsupportedVllm(f"vLLM's platform {current_platform.device_type!r} is not served")
    for name in ("worker_cls", "scheduler_cls"):
        chosen = getattr(arguments, name)
        if chosen != getattr(type(arguments), name):
            raise UnsupportedVllm(
                f"{name} is {chosen!r}, and edits need one of their own; leave one out"
            )
    own = {
        "worker_cls": worker,
        "scheduler_cls": "steer_server.vllm_plugin.scheduler.scheduler",
        "additional_config": {
            **(arguments.additional_config or {}),
            KEY: {
                "sites": list(map(str, sites)),
                "slots": slots,
                "version": __version__,
                "dictionaries": [
                    [name, str(entry.folder.resolve()), entry.card.arithmetic]
                    for name, entry in stored.items()
                ],
            },
        },
    }
    before = {name: getattr(arguments, name) for name in own}
    vars(arguments).update(own)
    try:
        config = create()
    finally:
        # A caller may make a second config of them.
        vars(arguments).update(before)
    endpoints.guard()
    offline.guard()
    check_supported(config)
    shape = model_shape(config.model_config.hf_text_config)
    for entry in stored.values():
        check_model(entry.card, shape)
    frontend = Frontend(sites, slots)
    for name, entry in stored.items():
        frontend.admission.add(name, entry)
    _attach_to_next(lambda processor: _answer(processor, frontend))
    return config


def leave_alone() -> None:
    """The next OutputProcessor belongs to an engine of steer's own."""
    _next.clear()


def _attach_to_next(then: Callable[[Any], None]) -> None:
    """The last config counts: whoever made one before has made no engine of it."""
    if not _next:
        _wrap_output_processor()
    _next[:] = [then]


def _wrap_output_processor() -> None:
    initialise = OutputProcessor.__init__

    def init(self: Any, *rest: Any, **named: Any) -> None:
        OutputProcessor.__init__ = initialise
        initialise(self, *rest, **named)
        if _next:
            _next.pop()(self)

    OutputProcessor.__init__ = init


def _refuse_programs(processor: Any) -> None:
    add = processor.add_request

    def add_request(request: Any, *rest: Any, **named: Any) -> None:
        parameters = request.sampling_params
        if parameters is not None and KEY in (parameters.extra_args or {}):
            raise VLLMValidationError(
                "this server has no dictionaries, so the edits of this request cannot be made: start it "
                "with STEER_DICTIONARIES=name=folder, or leave out vllm_xargs.steer",
                parameter=KEY,
            )
        add(request, *rest, **named)

    processor.add_request = add_request


def _answer(processor: Any, frontend: Frontend) -> None:
    """Admission, and with the last output of each request the proof of its edits and what it read."""
    attach(processor, frontend)
    add, process = processor.add_request, processor.process_outputs
    abort = processor.abort_requests
    answers = _Answers(processor, frontend)

    def add_request(request: Any, *rest: Any, **named: Any) -> None:
        try:
            add(request, *rest, **named)
        except SteerError as error:
            raise _bad_request(error) from error

    def process_outputs(outputs: Any, *rest: Any, **named: Any) -> Any:
        known = processor.request_states
        # With tokens an error may yet become a stop.
        states = [
            (known.get(output.request_id), None if output.new_token_ids else output.finish_reason)
            for output in outputs
        ]
        result = process(outputs, *rest, **named)
        answers.enter(states, result)
        return result

    def abort_requests(request_ids: Any, internal: bool) -> list[str]:
        known = dict(processor.request_states)
        ended = abort(request_ids, internal)
        answers.end([known[vllm_id] for vllm_id in ended])
        return ended

    processor.add_request, processor.process_outputs = add_request, process_outputs
    processor.abort_requests = abort_requests


class _Answers:
    """What is on its way to the callers."""

    def __init__(self, processor: Any, frontend: Frontend) -> None:
        self._processor = processor
        self._frontend = frontend
        self._rows: dict[str, list[ActivationRows]] = {}
        """By vLLM's id of a sequence: what it has read so far."""
        self._reports: dict[str, dict[str, Any]] = {}
        """By vLLM's id of a request: the reports of its sequences that have ended, by their number."""
        self._entries: Counter[str] = Counter()
        """By vLLM's id of a request: rows and activations so far."""
        self._left: Any = None
        """vLLM's result of a step that raised."""

    def enter(self, states: Sequence[tuple[Any, FinishReason | None]], result: Any) -> None:
        """A step's outputs have been made of these sequences; raises what one of an engine that is stepped failed with.

        Then the other outputs, and vLLM's notice that it ends there, come with the next step's.
        """
        failed = None
        for state, reason in states:
            account = state and self._frontend.accounts.get(state.request_id)
            if not account:
                continue
            if _broken(reason, account):
                # Other sequences of the request may have ended well.
                _deliver(state, result, self._reports.get(_parent(state), {}))
                continue
            try:
                self._enter(state, account, result)
            except SteerError as error:
                if state.queue is not None:
                    _fail(state, error)
                else:
                    self._end(state, result)
                    failed = failed or error
        self._forget_ended()
        if self._left is not None:
            result.request_outputs[:0] = self._left.request_outputs
            result.reqs_to_abort[:0] = self._left.reqs_to_abort
        self._left = None if failed is None else result
        if failed is not None:
            raise failed

    def end(self, states: Sequence[Any]) -> None:
        """vLLM's front-end has aborted these sequences, and put it on the queues of who awaits them."""
        for state in states:
            account = self._frontend.accounts.get(state.request_id)
            # vLLM aborts a request's sequences one by one, and once more says that it has.
            if not account or account.ended:
                continue
            try:
                if state.queue is not None and account.token_ids:
                    self._enter(state, account, None)
                elif state.queue is not None:
                    _deliver(state, None, self._reports.get(_parent(state), {}))
            except SteerError as error:
                _fail(state, error)
            self._frontend.end([state.request_id])
        for state in states:
            # vLLM keeps a request of several sequences that was aborted by the caller's name for it.
            if state.parent_req is None or not state.parent_req.child_requests:
                self._reports.pop(_parent(state), None)
                self._entries.pop(_parent(state), None)

    def _forget_ended(self) -> None:
        sequences, requests = self._processor.request_states, self._processor.parent_requests
        _forget(self._rows, sequences)
        _forget(self._reports, requests)
        _forget(self._entries, {**sequences, **requests} if self._entries else {})

    def _end(self, state: Any, result: Any) -> None:
        """Nothing comes of the request any more, nor of its other sequences."""
        ids = self._processor.abort_requests([_parent(state)], internal=True)
        result.reqs_to_abort += ids
        for step in filter(None, (result, self._left)):
            step.request_outputs[:] = [
                output
                for output in step.request_outputs
                if output.request_id != state.external_req_id
            ]

    def _enter(self, state: Any, account: Account, result: Any) -> None:
        vllm_id = state.request_id
        rows = self._rows.setdefault(vllm_id, [])
        found = account.take()
        if found and found.rows:
            self._entries[_parent(state)] += sum(
                len(part.positions) + len(part.features) for part in found.rows
            )
            if state.queue is not None and self._entries[_parent(state)] > MAX_ENTRIES:
                rows.clear()
                raise _too_large(self._entries[_parent(state)])
            rows += found.rows
        if vllm_id not in self._processor.request_states:
            reports = self._reports.setdefault(_parent(state), {})
            reports[str(state.request_index)] = _report(account, self._rows.pop(vllm_id))
            _deliver(state, result, reports)


def _forget(kept: dict[str, Any], known: Mapping[str, Any]) -> None:
    for vllm_id in kept.keys() - known.keys():
        del kept[vllm_id]


def _broken(reason: FinishReason | None, account: Account) -> bool:
    """Whether vLLM ended it itself: with an error, or before there was a token, and so before all rows of the prompt."""
    aborted = reason is FinishReason.ABORT and not account.token_ids
    return reason is FinishReason.ERROR or aborted


def _too_large(entries: int) -> AnswerTooLarge:
    return AnswerTooLarge(
        f"the read-outs have {entries} rows and activations by now, an answer at most {MAX_ENTRIES}; ask for less, or ask "
        "steer-server, which streams them",
        field="read_outs",
    )


def _report(account: Account, rows: list[ActivationRows]) -> dict[str, Any]:
    return {
        "edits": [report._asdict() for report in account.close()],
        "limited_tokens": account.limited_tokens,
        "activations": [
            {
                "read_out": entry.read_out,
                "dictionary": entry.dictionary,
                "positions": entry.positions.tolist(),
                "row_splits": entry.row_splits.tolist(),
                "features": entry.features.tolist(),
                "values": entry.values.tolist(),
            }
            for entry in rows
        ],
    }


def _parent(state: Any) -> str:
    """vLLM's id of the request that the sequence is of."""
    return state.request_id if state.parent_req is None else state.parent_req.request_id


def _deliver(state: Any, result: Any, reports: dict[str, Any]) -> None:
    """Puts the reports, if any, on the request's output, if there is one, which nobody has taken yet."""
    if not reports:
        return
    waiting = [state.queue.output] if state.queue is not None else result.request_outputs
    for output in waiting:
        if output is not None and getattr(output, "request_id", None) == state.external_req_id:
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: reports}


def _fail(state: Any, error: SteerError) -> None:
    """Ends one request with the error in place of the output that nobody has taken yet."""
    # vLLM hands the cause on and aborts the request.
    blamed = isinstance(error, InvalidRequest | AnswerTooLarge)
    state.queue.put(InputStreamError(_bad_request(error) if blamed else error))


def _bad_request(error: SteerError) -> VLLMValidationError:
    """What vLLM answers with 400."""
    where = f"{KEY}.{error.field}" if error.field else KEY
    return VLLMValidationError(f"{where}: {error}", parameter=where)
