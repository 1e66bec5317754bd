"""What a worker does around vLLM's warm-up, and around what it measures of a GPU."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationMode

from steer_server.errors import EditNotApplied, OutOfMemory
from steer_server.vllm_plugin import KEY
from steer_server.vllm_plugin.worker import SteerWorker


class Vllm:
    def compile_or_warm_up_model(self) -> float:
        return 1.5

    def determine_available_memory(self) -> int:
        return 7

    def sample_tokens(self, grammar_output: None) -> SimpleNamespace:
        return SimpleNamespace()


class Worker(SteerWorker, Vllm):
    def __init__(self, mode: CompilationMode, op_calls: list[int], device: str = "cpu") -> None:
        self.device = SimpleNamespace(type=device)
        self.model_config = SimpleNamespace(enforce_eager=False)
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(mode=mode))
        self.steer_sites = [0, 2]
        self.warmed_up = []
        self.steer = SimpleNamespace(
            op_calls=op_calls,
            end_step=lambda: None,
            warm_up=lambda: self.warmed_up.append(True),
            residents=SimpleNamespace(kept_free=0),
        )


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
    worker = Worker(mode, op_calls)

    assert worker.compile_or_warm_up_model() == 1.5
    assert worker.warmed_up == [True]


@pytest.mark.parametrize(("device", "kept_free"), [("cuda", 30 + 2**30), ("cpu", 0)])
def test_what_vllms_longest_step_took_of_a_gpu_is_kept_free_of_dictionaries(
    device: str, kept_free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = [100]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.append(50))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[-1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    worker = Worker(CompilationMode.NONE, [1, 1, 1], device)

    assert worker.determine_available_memory() == 7
    assert worker.steer.residents.kept_free == kept_free


@pytest.mark.parametrize(("last", "reports"), [(True, ["earlier"]), (False, None)])
def test_only_the_last_stage_answers_with_the_reports(
    last: bool, reports: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = SimpleNamespace(is_last_rank=last)
    monkeypatch.setattr("steer_server.vllm_plugin.worker.get_pp_group", lambda: stage)
    worker = Worker(CompilationMode.NONE, [])
    worker._arrived = ["earlier"]

    assert getattr(worker.sample_tokens(None), KEY, None) == reports


def test_of_a_step_that_failed_nothing_hides_what_it_failed_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = SimpleNamespace(is_last_rank=True)
    monkeypatch.setattr("steer_server.vllm_plugin.worker.get_pp_group", lambda: stage)
    monkeypatch.setattr(Vllm, "sample_tokens", lambda *_: None)
    worker = Worker(CompilationMode.NONE, [])
    worker._arrived = []
    worker.steer.end_step = lambda: "a step"

    assert worker.sample_tokens(None) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OutOfMemory("full"), "OutOfMemory"), (OSError("gone"), "EngineUnavailable")],
)
def test_whatever_a_worker_cannot_load_it_says_and_raises_nothing(
    error: Exception, kind: str
) -> None:
    def place(name: str, resident: None) -> None:
        raise error

    worker = Worker(CompilationMode.NONE, [])
    worker.steer.residents.place = place
    worker._read = {"d": Future()}
    worker._read["d"].set_result(None)

    said, why = worker.steer_load("d")

    assert said == kind
    assert str(error) in why
