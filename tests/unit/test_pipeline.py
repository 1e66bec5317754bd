"""How results are packed between pipeline stages; tests/e2e/test_parallel.py sends them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sequence import IntermediateTensors

from steer_server.vllm_plugin import pipeline
from steer_server.vllm_plugin.pipeline import pack, relay, unpack


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("length", range(16))
def test_results_survive_packing_and_no_number_of_ranks_divides_them(
    ranks: int, length: int
) -> None:
    results = [{"request": [b"x" * length, 1.5, None]}]

    packed = pack(results, ranks)

    assert packed.dtype == torch.uint8
    assert unpack(packed) == results
    assert ranks == 1 or packed.numel() % ranks != 0


class Stage:
    """A model runner that returns the same tensors in every step, as a replayed CUDA graph does."""

    def __init__(self) -> None:
        self.output = IntermediateTensors({"hidden_states": torch.zeros(1)})
        self.dummies: list[dict[str, Any]] = []

    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, **named: Any
    ) -> IntermediateTensors:
        if named:
            self.dummies.append(named)
        return self.output


@pytest.fixture
def first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "get_pp_group", lambda: SimpleNamespace(is_last_rank=False))
    monkeypatch.setattr(
        pipeline, "get_tp_group", lambda: SimpleNamespace(rank_in_group=0, world_size=1)
    )


@pytest.mark.usefixtures("first_stage")
def test_what_a_stage_said_is_not_said_again_in_a_step_without_anything_to_say() -> None:
    said = iter(["said", None])
    execute = relay(Stage(), lambda: next(said), [])
    step = SimpleNamespace(total_num_scheduled_tokens=1)

    assert unpack(execute(step).tensors["steer"]) == ["said"]
    assert list(execute(step).tensors) == ["hidden_states"]


@pytest.mark.usefixtures("first_stage")
def test_a_warm_up_of_the_v2_runner_passes_and_ends_no_step() -> None:
    stage = Stage()
    execute = relay(stage, pytest.fail, [])
    options = {"dummy_run": True, "skip_attn_for_dummy_run": True, "is_profile": True}

    assert execute(SimpleNamespace(total_num_scheduled_tokens=1), None, **options) is stage.output
    assert stage.dummies == [options]
