"""Steering where vLLM takes requests in and gives outputs out: two methods of its OutputProcessor are wrapped.

Every request of every front-end passes through both, whoever made it: admission happens before the request leaves for
the engine, and results are taken out before vLLM merges the outputs of a slow reader.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from steer_server.admission import check_revisions, check_scopes, parse
from steer_server.dictionary.site import Site
from steer_server.errors import EditNotApplied, EditTooLarge, InvalidRequest, SteerError
from steer_server.generation import SlotLoad
from steer_server.program import Program
from steer_server.vllm_plugin import KEY
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.admitted import Admission, Admitted
from steer_server.vllm_plugin.ledger import EditTally, Ledger
from steer_server.vllm_plugin.report import StepReport, StepResult
from steer_server.vllm_plugin.salts import Salts

LIVE = "steer_live"
"""In `extra_args` beside the program of a request that may be updated while it runs."""
FORCED = "steer_forced"
"""Beside it: how many tokens at the prompt's end count as generated."""
DISTRIBUTION = "steer_distribution"
"""Beside it: the log-probabilities go to the account, not through vLLM's lists."""
_BESIDE = {LIVE, FORCED, DISTRIBUTION}
_OWN = {KEY, *_BESIDE}


class Frontend:
    """One per vLLM front-end: the dictionaries that requests may name, and an account of each request with a program."""

    def __init__(
        self,
        sites: Sequence[Site],
        slots: int,
        opened: Callable[[str, Account], None] = lambda name, account: None,
    ) -> None:
        """`opened` gets the caller's id and the account of each request with a program that has come in.

        Whoever needs the account to the end keeps it: here it is forgotten once vLLM is done with the request, which
        may be before the caller has read a single output.
        """
        self._opened = opened
        self.admission = Admission(sites, slots)
        self.accounts: dict[str, Account] = {}
        """By vLLM's own request id."""
        self._ledger = Ledger(self._tell)
        self._salts = Salts()
        self._slots_used, self._held = [0] * len(sites), 0
        self._names: dict[tuple[str, int], str] = {}
        """vLLM's own id by (the caller's id, index among n)."""

    @property
    def load(self) -> SlotLoad:
        """As of the last step that the engine told of."""
        used = dict(zip(map(str, self.admission.sites), self._slots_used, strict=True))
        return SlotLoad(used, self.admission.slots, self._held)

    def account(self, name: str, index: int = 0) -> Account | None:
        """The account of a request by the caller's id; None if it has no program."""
        vllm_id = self._names.get((name, index))
        return self.accounts.get(vllm_id) if vllm_id else None

    def admit(self, request: EngineCoreRequest, index: int, known: Mapping[str, Any]) -> None:
        """Checks and resolves the program of a new request, and sees to its cache. InvalidRequest if it cannot run.

        `known` are the requests vLLM has in hand.
        """
        name = request.external_req_id or request.request_id
        # An ended request of the same name may have had one.
        self._names.pop((name, index), None)
        parameters = request.sampling_params
        extra = parameters.extra_args if parameters is not None else None
        if not extra or KEY not in extra:
            return
        assert parameters is not None
        if request.prompt_token_ids is None:
            raise InvalidRequest("edits and read-outs need a prompt of tokens, not of embeddings")
        if request.resumable:
            raise InvalidRequest(
                "edits and read-outs need a prompt that has come whole, not a stream"
            )
        if _BESIDE & extra.keys() and not isinstance(extra[KEY], Program):
            # Text comes from clients, who could pass off edited rows of a prompt as another one's.
            raise InvalidRequest(f"takes none of {', '.join(sorted(_BESIDE))} beside it")
        live, forced = bool(extra.get(LIVE)), extra.get(FORCED, 0)
        length = len(request.prompt_token_ids) - forced
        program = parse(extra[KEY], self.admission.dictionaries)
        admitted = self.admission.admit(program, length)
        check_scopes(admitted.program, length, forced + (parameters.max_tokens or 1))
        rest = {key: value for key, value in extra.items() if key not in _OWN}
        # vLLM gives several sequences of one request the same parameters.
        parameters = request.sampling_params = copy(parameters)
        parameters.extra_args = {**rest, KEY: {**admitted.content, "prompt_length": length}}
        self._forget_ended(known)
        ids = request.prompt_token_ids
        account = Account(ids[:length], [admitted.program], token_ids=list(ids[length:]))
        account.settle = self._ledger.settle
        account.wants_distribution = bool(extra.get(DISTRIBUTION))
        self._see_to_cache(request, parameters, admitted, account, live)
        self.accounts[request.request_id] = account
        self._names[name, index] = request.request_id
        self._opened(name, account)

    def update(
        self, name: str, program: Program, at_index: int | None = None
    ) -> tuple[int, EngineCoreRequest]:
        """The revision that `program` will be, from generated token `at_index` on, and the message to send to the engine.

        InvalidRequest if there is no such request, or not that program; Overloaded after too many, or too many features.
        """
        if at_index is not None and at_index < 0:
            raise InvalidRequest(
                f"{at_index} is no index of a generated token; they count from 0", field="at_index"
            )
        vllm_id, account = self._live(name, "its edits cannot change")
        admitted = self.admission.admit(program, account.prompt_length)
        programs = [*account.programs, admitted.program]
        admission = self.admission
        check_revisions(programs, admission.dictionaries, admission.slots)
        # Token 0 is drawn from the row of the prompt's last token.
        first = 0 if at_index is None else account.prompt_length - 1 + at_index
        message = _message({**admitted.content, "update": vllm_id, "first": first})
        return account.add_revision(admitted.program), message

    def pause(self, name: str, paused: bool) -> EngineCoreRequest:
        """The message that pauses a request or lets it go on. InvalidRequest if there is none."""
        vllm_id, _ = self._live(name, "it can neither pause nor go on")
        return _message({"pause": vllm_id, "paused": paused})

    def _live(self, name: str, so: str) -> tuple[str, Account]:
        vllm_id = self._names.get((name, 0), "")
        account = self._running(vllm_id)
        if account is None:
            raise InvalidRequest(f"generation {name!r} is not live or has ended; {so}")
        return vllm_id, account

    def receive(self, outputs: Sequence[Any]) -> None:
        """Takes the reports out of vLLM's outputs and enters them into the accounts."""
        for output in outputs:
            content = (output.kv_transfer_params or {}).pop(KEY, None)
            if content is not None:
                output.kv_transfer_params = output.kv_transfer_params or None
                self._enter(content)
            account = self._running(output.request_id)
            if account is not None:
                account.token_ids += output.new_token_ids
                if account.wants_distribution and output.new_logprobs is not None:
                    # vLLM would make a Python object of every token's.
                    account.distribution, output.new_logprobs = output.new_logprobs, None

    def end(self, vllm_ids: Iterable[str]) -> None:
        """vLLM has ended these requests: what steps that had begun by then tell of them counts for nothing."""
        ended = [account for vllm_id in vllm_ids if (account := self._running(vllm_id))]
        if ended:
            self._ledger.settle()
        for account in ended:
            account.ended = True

    def _running(self, vllm_id: str) -> Account | None:
        account = self.accounts.get(vllm_id)
        return None if account is None or account.ended else account

    def _enter(self, content: Mapping[str, Any]) -> None:
        self._slots_used, self._held = content["load"]
        for report in map(StepReport.from_wire, content["reports"]):
            self._ledger.enter(report)
            report.deliver(self._result)
            for request, position, why in report.missed:
                self._distrust(report.requests[request], position, EditNotApplied(why))
            for request, position, why in report.too_large:
                self._distrust(report.requests[request], position, EditTooLarge(why))

    def _result(self, vllm_id: str) -> StepResult:
        """What the request gathers; if it has ended, nobody reads it."""
        account = self._running(vllm_id)
        return StepResult() if account is None else account.result

    def _distrust(self, vllm_id: str, position: int, error: SteerError) -> None:
        """The request's row at `position` was left unedited, and others may have its KV blocks already."""
        for account in self._salts.spoil(vllm_id, position):
            account.distrust(position, error)

    def _tell(self, vllm_id: str, tally: EditTally) -> None:
        account = self._running(vllm_id)
        if account is not None:
            account.enter(tally)

    def _see_to_cache(
        self,
        request: EngineCoreRequest,
        parameters: SamplingParams,
        admitted: Admitted,
        account: Account,
        live: bool,
    ) -> None:
        program, nonce = admitted.program, uuid.uuid4().hex if live else ""
        salt = program.cache_salt(admitted.digest, account.prompt_length, nonce)
        if salt is not None:
            # The caller's own salt keeps apart what it kept apart.
            salt = f"{request.cache_salt or ''}{salt}"
            request.cache_salt = salt if live else self._salts.give(request, salt, account)
        if any(entry.prompt and entry.complete for entry in program.read_outs):
            # Cached prompt tokens are never computed, so they could not be read.
            parameters.skip_reading_prefix_cache = True

    def _forget_ended(self, known: Mapping[str, Any]) -> None:
        ended = self.accounts.keys() - known.keys()
        if not ended:
            return
        # Who holds such an account may not have closed it yet.
        self._ledger.settle()
        self._salts.end(ended)
        for vllm_id in ended:
            del self.accounts[vllm_id]
        self._names = {key: vllm_id for key, vllm_id in self._names.items() if vllm_id not in ended}


def attach(processor: Any, frontend: Frontend) -> None:
    """Wraps the two methods of a vLLM OutputProcessor."""
    add, process = processor.add_request, processor.process_outputs

    def add_request(
        request: Any, prompt: Any, parent: Any = None, index: int = 0, *rest: Any, **named: Any
    ) -> None:
        frontend.admit(request, index, processor.request_states)
        add(request, prompt, parent, index, *rest, **named)

    def process_outputs(outputs: Any, *rest: Any, **named: Any) -> Any:
        frontend.receive(outputs)
        result = process(outputs, *rest, **named)
        known = processor.request_states
        frontend.end(entry.request_id for entry in outputs if entry.request_id not in known)
        return result

    processor.add_request = add_request
    processor.process_outputs = process_outputs


def _message(content: dict[str, Any]) -> EngineCoreRequest:
    """An update or a pause dressed as a request: the one message that every vLLM client passes to the scheduler in order."""
    return EngineCoreRequest(
        request_id=f"steer-update-{uuid.uuid4().hex}",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, extra_args={KEY: content}),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
