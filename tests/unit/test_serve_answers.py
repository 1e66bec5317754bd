"""What plain vLLM's callers get of requests with programs, through vLLM's own OutputProcessor."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.async_llm import InputStreamError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from steer_server.errors import EditNotApplied, EditTooLarge
from steer_server.vllm_plugin import KEY, serve
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.frontend import Frontend, attach
from steer_server.vllm_plugin.report import RowBlock, StepReport
from steer_server.vllm_plugin.serve import _answer
from tests.unit.serving import NAME, small_dictionary
from tests.unit.test_frontend import report, request

PROMPT = 4


class FrontEnd:
    """Plain vLLM's, with one dictionary."""

    def __init__(self) -> None:
        stored = small_dictionary()
        frontend = Frontend([stored.card.site], 8)
        frontend.admission.add(NAME, stored)
        self.processor = OutputProcessor(None, log_stats=False)
        _answer(self.processor, frontend)

    def send(
        self,
        name: str,
        queue: RequestOutputCollector | None = None,
        parent: ParentRequest | None = None,
        index: int = 0,
    ) -> None:
        one = request(name, PROMPT)
        one.external_req_id = parent.external_req_id if parent else name
        assert one.sampling_params
        one.sampling_params.detokenize = False
        if parent:
            one.sampling_params.output_kind = RequestOutputKind.FINAL_ONLY
        self.processor.add_request(one, None, parent, index, queue)

    def step(self, names: Sequence[str], finish: FinishReason | None, *reports: StepReport) -> Any:
        """What comes of a step in which each of them got a token, or ended without one."""
        tokens = [] if finish else [9]
        outputs = [EngineCoreOutput(name, tokens, finish_reason=finish) for name in names]
        content = {"load": ([1], 0), "reports": [step.to_wire() for step in reports]}
        outputs[0].kv_transfer_params = {KEY: content}
        return self.processor.process_outputs(outputs)


def sequences(n: int) -> tuple[ParentRequest, list[str]]:
    """A request of `n` sequences, and vLLM's ids of them."""
    whole = request("whole", PROMPT)
    whole.external_req_id = "whole"
    assert whole.sampling_params
    whole.sampling_params.n = n
    whole.sampling_params.output_kind = RequestOutputKind.FINAL_ONLY
    parent = ParentRequest(whole)
    return parent, [parent.get_child_info(index)[0] for index in range(n)]


@pytest.fixture
def front_end() -> FrontEnd:
    return FrontEnd()


async def test_what_vllm_aborts_between_two_tokens_is_proved_so_far(front_end: FrontEnd) -> None:
    queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, "a")
    front_end.send("a", queue)

    front_end.step(["a"], None, report("a"))
    front_end.step(["a"], FinishReason.ABORT)

    output: Any = await queue.get()
    assert output.outputs[0].finish_reason == "abort"
    assert output.kv_transfer_params[KEY]["0"]["edits"][0]["tokens_in_scope"] == 3


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_what_vllm_ends_itself_keeps_its_reason(
    front_end: FrontEnd, reason: FinishReason
) -> None:
    queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, "a")
    front_end.send("a", queue)

    front_end.step(["a"], reason)

    output: Any = await queue.get()
    assert output.outputs[0].finish_reason == str(reason)


@pytest.mark.parametrize("internal", [False, True])
async def test_what_the_front_end_aborts_is_proved_so_far(
    front_end: FrontEnd, internal: bool
) -> None:
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "whole")
    parent, ids = sequences(3)
    for index, name in enumerate(ids):
        front_end.send(name, queue, parent, index)
    front_end.step(ids[:2], None, *map(report, ids[:2]))
    front_end.step(ids[:1], FinishReason.LENGTH)

    front_end.processor.abort_requests(["whole"], internal=internal)

    output: Any = await queue.get()
    assert [entry.finish_reason for entry in output.outputs] == ["length", "abort", "abort"]
    reports = output.kv_transfer_params[KEY]
    answers = inspect.getclosurevars(front_end.processor.abort_requests).nonlocals["answers"]
    assert not answers._reports
    assert not answers._entries
    # The last one had no token yet, and so not all rows of its prompt.
    assert [reports[name]["edits"][0]["tokens_in_scope"] for name in sorted(reports)] == [3, 3]


async def test_what_the_front_end_aborts_without_all_edits_is_an_error(front_end: FrontEnd) -> None:
    queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, "a")
    front_end.send("a", queue)
    front_end.step(["a"], None)

    front_end.processor.abort_requests(["a"], internal=False)

    with pytest.raises(InputStreamError, match="ran on 0 tokens"):
        await queue.get()


async def test_more_read_outs_than_an_answer_holds_end_the_request(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "MAX_ENTRIES", 5)
    queues = {name: RequestOutputCollector(RequestOutputKind.CUMULATIVE, name) for name in "ab"}
    for name, queue in queues.items():
        front_end.send(name, queue)

    for position in range(3):
        front_end.step(["a"], None, row(position))
    front_end.step(["b"], None, report("b"))
    front_end.step(["b"], FinishReason.LENGTH)

    with pytest.raises(InputStreamError, match="6 rows and activations"):
        await queues["a"].get()
    output: Any = await queues["b"].get()
    assert output.kv_transfer_params[KEY]["0"]["activations"] == []


def row(position: int) -> StepReport:
    """Of one feature of a row of request "a"."""
    one = np.array([1], np.uint32)
    values = np.array([0.5], np.float32)
    block = RowBlock(NAME, [(0, 0, 1)], np.array([position], np.uint32), one, one, values, None, 0)
    return StepReport(["a"], rows=[block])


async def test_an_end_without_all_edits_is_an_error(front_end: FrontEnd) -> None:
    queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, "a")
    front_end.send("a", queue)

    front_end.step(["a"], None)
    front_end.step(["a"], FinishReason.LENGTH)

    with pytest.raises(InputStreamError) as ended:
        await queue.get()
    assert "ran on 0 tokens, its scope holds 3" in str(ended.value.cause)


def test_of_an_engine_that_is_stepped_a_failed_request_never_comes_back_and_the_others_do(
    front_end: FrontEnd,
) -> None:
    names = ["failed", "ended beside it", "other"]
    for name in names:
        front_end.send(name)
    front_end.step(names, None, *map(report, names))
    too_large = StepReport(["failed"], too_large=[(0, 2, "too large here")])

    with pytest.raises(EditTooLarge, match="too large here"):
        front_end.step(names[:2], FinishReason.LENGTH, too_large)
    result = front_end.step([names[0], names[2]], FinishReason.LENGTH)

    assert [output.request_id for output in result.request_outputs] == names[1:]
    for output in result.request_outputs:
        (edit,) = output.kv_transfer_params[KEY]["0"]["edits"]
        assert edit["tokens_in_scope"] == 3
    assert front_end.step(["failed"], None).request_outputs == []
    assert not front_end.processor.has_unfinished_requests()


def test_who_fails_a_step_later_takes_back_what_the_step_before_had_of_it(
    front_end: FrontEnd,
) -> None:
    for name in ("a", "b"):
        front_end.send(name)

    with pytest.raises(EditTooLarge):
        front_end.step(["a", "b"], None, StepReport(["a"], too_large=[(0, 2, "why")]))
    with pytest.raises(EditTooLarge):
        front_end.step(["b"], None, StepReport(["b"], too_large=[(0, 2, "why")]))

    assert front_end.step(["b"], None).request_outputs == []


def test_a_sequence_that_ended_well_is_proved_if_vllm_ends_another(front_end: FrontEnd) -> None:
    parent, ids = sequences(2)
    for index, name in enumerate(ids):
        front_end.send(name, parent=parent, index=index)
    front_end.step(ids[:1], None, report(ids[0]))
    front_end.step(ids[:1], FinishReason.LENGTH)

    result = front_end.step(ids[1:], FinishReason.ABORT)

    (output,) = result.request_outputs
    assert [entry.finish_reason for entry in output.outputs] == ["length", "abort"]
    assert output.kv_transfer_params[KEY]["0"]["edits"][0]["tokens_in_scope"] == 3


def test_an_error_with_tokens_is_proved_as_any_other_end(front_end: FrontEnd) -> None:
    front_end.send("a")
    output = EngineCoreOutput("a", [9], finish_reason=FinishReason.ERROR)

    with pytest.raises(EditNotApplied):
        front_end.processor.process_outputs([output])


def test_vllm_is_told_to_end_all_sequences_of_a_request_that_failed(front_end: FrontEnd) -> None:
    parent, ids = sequences(3)
    for index, name in enumerate(ids):
        front_end.send(name, parent=parent, index=index)

    with pytest.raises(EditTooLarge):
        front_end.step(ids, None, StepReport(ids[1:2], too_large=[(0, 2, "why")]))

    assert sorted(front_end.step(ids, None).reqs_to_abort) == sorted(ids)
    assert not front_end.processor.parent_requests


async def test_what_a_step_tells_of_a_request_that_has_ended_counts_for_nothing() -> None:
    stored = small_dictionary()
    opened: dict[str, Account] = {}
    frontend = Frontend([stored.card.site], 8, opened.__setitem__)
    frontend.admission.add(NAME, stored)
    processor = OutputProcessor(None, log_stats=False)
    attach(processor, frontend)
    one = request("slow", PROMPT)
    one.external_req_id = "slow"
    assert one.sampling_params
    one.sampling_params.detokenize = False
    processor.add_request(
        one, None, None, 0, RequestOutputCollector(RequestOutputKind.DELTA, "slow")
    )

    def step() -> None:
        output = EngineCoreOutput("slow", [9], finish_reason=FinishReason.STOP)
        told = [report("slow"), StepReport(["slow"], applied=[(0, 1, 4)])]
        content = {"load": ([1], 0), "reports": [part.to_wire() for part in told]}
        output.kv_transfer_params = {KEY: content}
        processor.process_outputs([output])

    # Who asked for it has read nothing yet.
    step()
    step()

    account = opened["slow"]
    assert account.token_ids == [9]
    assert account.result.applied == [(1, 4)]
    (edit,) = account.close()
    assert edit.tokens_in_scope == 3
