"""vLLM's own scheduler with steer's duties, driven step by step; what a worker would do with its output is played.

Token t of a request is drawn from the row of position prompt + t - 1, and says how many tokens came before it.
"""

from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from steer_server.program import Program
from steer_server.vllm_plugin import KEY
from steer_server.vllm_plugin.requests import RequestState
from steer_server.vllm_plugin.scheduler import scheduler

BLOCK, BLOCKS, CHUNK, SLOTS = 16, 24, 64, 4
PROMPT = 100


@pytest.fixture(scope="module")
def config(model_path: Any) -> VllmConfig:
    return VllmConfig(
        model_config=ModelConfig(model=str(model_path), dtype="float32", max_model_len=256),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=CHUNK,
            max_model_len=256,
            is_encoder_decoder=False,
        ),
        additional_config={KEY: {"sites": ["resid_post.1"], "slots": SLOTS}},
    )


class Engine:
    """A scheduler and a worker with nothing but the count of what was computed."""

    def __init__(self, config: VllmConfig, asynchronous: bool) -> None:
        init_none_hash(sha256)
        attention = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        config.scheduler_config.async_scheduling = asynchronous
        config.cache_config.num_gpu_blocks = BLOCKS
        self.scheduler: Any = scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], attention)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        self._depth = int(asynchronous)
        self._under_way: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._drawn: dict[str, int] = {}
        self.states: dict[str, RequestState] = {}
        self.rows: dict[str, list[tuple[int, int]]] = {}
        """By request: the runs of positions that were computed, step by step."""
        self.tokens: dict[str, list[int]] = {}
        """By request: those that came out."""
        self.revisions: dict[str, list[int]] = {}
        """By request: under which each token was drawn."""
        self.applied: dict[str, list[tuple[int, int]]] = {}
        """By request: (revision, the first token drawn under it)."""

    def add(self, name: str, tokens: int = 12, features: Iterable[int] = ()) -> None:
        slots = [(0, "d", feature) for feature in features]
        extra = {KEY: {"program": "{}", "features": slots}}
        self.rows[name], self.tokens[name], self.revisions[name] = [], [], []
        self._drawn[name] = 0
        self.states[name] = RequestState(PROMPT, [Program()])
        self.applied[name] = []
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=extra)
        self.scheduler.add_request(_request(name, [ord(name[0])] * PROMPT, parameters))

    def update(self, name: str, at_index: int | None = None, features: Iterable[int] = ()) -> None:
        first = 0 if at_index is None else PROMPT - 1 + at_index
        slots = [(0, "d", feature) for feature in features]
        self._tell({"update": name, "first": first, "program": "{}", "features": slots})

    def pause(self, name: str) -> None:
        self._tell({"pause": name, "paused": True})

    def resume(self, name: str) -> None:
        self._tell({"pause": name, "paused": False})

    def _tell(self, content: dict[str, Any]) -> None:
        parameters = SamplingParams(max_tokens=1, extra_args={KEY: content})
        self.scheduler.add_request(_request("message", [0], parameters))

    @property
    def idle(self) -> bool:
        """Whether vLLM would wait for messages instead of stepping."""
        return not self.scheduler.has_requests() and not self._under_way

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            computed = False
            if self.scheduler.has_requests():
                output = self.scheduler.schedule()
                computed = output.total_num_scheduled_tokens > 0
                if computed:
                    self._under_way.append((output, self._compute(output)))
            # As vLLM's engine core: it waits for a result once the queue is full or there is nothing to compute.
            if len(self._under_way) > self._depth or not computed:
                self._return()

    def run(self, until: dict[str, int] | None = None) -> None:
        """Steps until nothing is to do, or until each of these requests has so many tokens."""
        for _ in range(200):
            if self.idle or (until and all(len(self.tokens[n]) >= k for n, k in until.items())):
                return
            self.step()
        raise AssertionError("there is no end to it")

    def _return(self) -> None:
        if self._under_way:
            outputs = self.scheduler.update_from_output(*self._under_way.popleft())
            for output in (output for group in outputs.values() for output in group.outputs):
                self.tokens[output.request_id] += output.new_token_ids

    def _compute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        drawn = [self._rows_of(name, starts[name], n, output) for name, n in _scheduled(output)]
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, drawn)

    def _rows_of(self, name: str, start: int, count: int, output: SchedulerOutput) -> list[int]:
        state, stop = self.states[name], start + count
        for _, first in getattr(output, "steer_updates", {}).get(name, ()):
            state.waiting.append((Program(), first))
        begun, _ = state.begin(start)
        self.applied[name] += [(revision, max(0, p - PROMPT + 1)) for revision, p in begun]
        self.rows[name].append((start, stop))
        if stop < PROMPT + self._drawn[name]:
            return []
        ((revision, _, _),) = state.revisions(stop - 1, stop)
        self.revisions[name].append(revision)
        state.done = stop
        self._drawn[name] += 1
        return [self._drawn[name] - 1]


def _request(name: str, prompt: list[int], parameters: SamplingParams) -> Request:
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt, parameters, None, block_hasher=hasher)


def _scheduled(output: SchedulerOutput) -> list[tuple[str, int]]:
    return list(output.num_scheduled_tokens.items())


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def engine(config: VllmConfig, request: pytest.FixtureRequest) -> Engine:
    return Engine(config, request.param)


def test_an_update_holds_from_the_very_token_it_names(engine: Engine) -> None:
    engine.add("a")
    engine.add("b")
    engine.update("a", 5)
    engine.update("b", 0)
    engine.run({"b": 3})
    engine.update("b", 7)
    engine.run()

    assert engine.revisions == {"a": [0] * 5 + [1] * 7, "b": [1] * 7 + [2] * 5}
    assert engine.applied == {"a": [(1, 5)], "b": [(1, 0), (2, 7)]}


def test_an_update_for_a_token_that_has_been_drawn_holds_from_the_next_step(
    engine: Engine,
) -> None:
    engine.add("a")
    engine.run({"a": 6})
    engine.update("a", 2)
    engine.run()

    ((revision, index),) = engine.applied["a"]
    assert revision == 1
    assert 6 <= index <= 7
    assert engine.revisions["a"] == [0] * index + [1] * (12 - index)


def test_a_later_update_that_is_due_takes_the_place_of_one_that_waits(engine: Engine) -> None:
    engine.add("a", features=[0])
    engine.update("a", 9, features=[1, 2, 3])
    engine.update("a", 4, features=[0])
    engine.run({"a": 6})

    assert engine.applied["a"] == [(1, 4), (2, 4)]
    # What never held has never needed its slots.
    assert engine.scheduler._slots[0].used == 1
    engine.run()
    assert engine.revisions["a"] == [0] * 4 + [2] * 8


def test_an_update_that_finds_its_slots_does_not_wait_for_one_before_it_that_finds_none(
    engine: Engine,
) -> None:
    engine.add("a", tokens=12, features=[0, 1])
    engine.add("b", tokens=40, features=[2, 3])
    engine.run({"a": 3, "b": 3})
    engine.update("a", features=[4])
    engine.run({"a": 6})
    assert engine.scheduler._waiting == 1
    engine.update("a", features=[])
    engine.run({"a": 12})

    (first, second) = engine.applied["a"]
    assert (first[0], second[0]) == (1, 2)
    # The one that waited never holds.
    assert first[1] == second[1] <= 8
    assert engine.revisions["a"] == [0] * first[1] + [2] * (12 - first[1])
    assert engine.scheduler._waiting == 0
    engine.run()
    assert engine.scheduler._slots[0].used == 0


def test_a_request_without_edits_does_not_wait_behind_one_that_waits_for_slots(
    engine: Engine,
) -> None:
    engine.add("a", tokens=40, features=[0, 1, 2])
    engine.add("b", features=[3, 4])
    engine.add("c", features=[3])
    engine.add("d")
    engine.run({"d": 12})

    assert len(engine.tokens["a"]) < 40
    # The small one does not pass the big one, which would starve.
    assert engine.tokens["b"] == engine.tokens["c"] == []
    engine.run()
    assert len(engine.tokens["b"]) == len(engine.tokens["c"]) == 12


def test_an_update_whose_token_never_comes_waits_for_no_slots(engine: Engine) -> None:
    engine.add("a", features=[0])
    engine.update("a", 99, features=[1])
    engine.run({"a": 4})

    assert engine.scheduler._waiting == 0
    engine.run()
    assert engine.applied["a"] == []
    assert engine.scheduler._updates == {}
    assert engine.scheduler._slots[0].used == 0


def test_a_paused_request_computes_nothing_and_then_goes_on_where_it_stopped(
    engine: Engine,
) -> None:
    engine.add("a")
    engine.add("b", tokens=40)
    engine.run({"a": 4})
    engine.pause("a")
    engine.run({"b": 20})
    steps, so_far = len(engine.rows["a"]), len(engine.tokens["a"])
    engine.run({"b": 30})

    assert so_far <= 6
    assert len(engine.rows["a"]) == steps
    assert len(engine.tokens["a"]) == so_far
    engine.resume("a")
    engine.run()
    assert engine.tokens == {"a": list(range(12)), "b": list(range(40))}
    # Only the block that was not full is computed again.
    assert engine.rows["a"][steps] == (6 * BLOCK, PROMPT + so_far)


def test_a_pause_gives_its_blocks_to_others_and_its_place_in_the_batch(engine: Engine) -> None:
    engine.add("a")
    engine.run({"a": 2})
    used = engine.scheduler.kv_cache_manager.usage
    engine.pause("a")
    engine.run()

    assert used > 0
    assert engine.scheduler.kv_cache_manager.usage == 0
    assert engine.scheduler.running == []


def test_with_all_requests_paused_the_engine_is_idle_until_one_goes_on(engine: Engine) -> None:
    for name in "ab":
        engine.add(name)
    engine.run({"a": 3, "b": 3})
    for name in "ab":
        engine.pause(name)
    engine.run()

    assert engine.scheduler.get_request_counts() == (0, 0)
    engine.resume("b")
    assert not engine.idle
    engine.run()
    assert engine.tokens["b"] == list(range(12))
    assert len(engine.tokens["a"]) < 12


def test_a_request_may_be_paused_before_it_has_begun_and_in_the_middle_of_its_prompt(
    engine: Engine,
) -> None:
    engine.add("a")
    engine.step()
    engine.pause("a")
    engine.add("b")
    engine.pause("b")
    engine.add("c")
    engine.run()

    assert engine.tokens == {"a": [], "b": [], "c": list(range(12))}
    assert engine.rows["b"] == []
    for name in "ab":
        engine.resume(name)
    engine.run()
    assert engine.tokens == {name: list(range(12)) for name in "abc"}


def test_a_request_may_be_paused_while_it_waits_for_slots(engine: Engine) -> None:
    engine.add("a", features=range(SLOTS))
    engine.add("b", features=[9])
    engine.pause("b")
    engine.run()

    assert engine.tokens["b"] == []
    engine.resume("b")
    engine.run()
    assert engine.tokens["b"] == list(range(12))


def test_pausing_and_resuming_twice_or_in_the_same_breath_changes_nothing(engine: Engine) -> None:
    engine.add("a")
    engine.resume("a")
    engine.run({"a": 3})
    steps = len(engine.rows["a"])
    engine.pause("a")
    engine.resume("a")
    engine.step()

    assert len(engine.rows["a"]) == steps + 1
    for change in (engine.pause, engine.resume):
        change("a")
        engine.step(2)
        change("a")
        engine.step(2)
    engine.run()
    assert engine.tokens["a"] == list(range(12))


def test_updates_wait_for_a_paused_request_and_hold_where_they_say(engine: Engine) -> None:
    engine.add("a")
    engine.update("a", 3)
    engine.run({"a": 5})
    engine.pause("a")
    engine.run()
    drawn = len(engine.tokens["a"])
    engine.update("a")
    engine.update("a", 9)
    engine.resume("a")
    engine.run()

    assert engine.applied["a"] == [(1, 3), (2, drawn), (3, 9)]
    assert engine.revisions["a"] == [0] * 3 + [1] * (drawn - 3) + [2] * (9 - drawn) + [3] * 3


@pytest.mark.parametrize("begun", [False, True])
def test_a_paused_request_can_be_aborted_and_leaves_nothing(engine: Engine, begun: bool) -> None:
    engine.add("a", features=[0])
    if begun:
        engine.run({"a": 3})
    engine.pause("a")
    engine.run()
    engine.update("a", 9, features=[1])
    engine.scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    engine.run()
    engine.resume("a")
    engine.pause("a")

    assert engine.idle
    assert engine.scheduler.requests == {}
    assert engine.scheduler._slots[0].used == 0
    assert engine.scheduler._paused == {}
    engine.add("b")
    engine.run()
    assert engine.tokens["b"] == list(range(12))
    assert engine.scheduler._pausing == set()


def test_a_request_whose_last_token_was_under_way_as_it_paused_ends(config: VllmConfig) -> None:
    engine = Engine(config, asynchronous=True)
    engine.add("a", tokens=4)
    engine.run({"a": 2})
    engine.step()
    engine.pause("a")
    engine.run()

    assert engine.tokens["a"] == list(range(4))
    assert engine.scheduler.requests == {}
    assert engine.scheduler._paused == {}


@pytest.mark.parametrize("seed", range(8))
def test_random_pauses_and_updates_lose_no_token_and_no_revision(engine: Engine, seed: int) -> None:
    """The blocks are too few for all four, so that vLLM preempts, too."""
    random = np.random.default_rng(seed)
    sent: dict[str, list[int | None]] = {name: [] for name in "abcd"}
    for name in sent:
        engine.add(name, tokens=30)
    for _ in range(120):
        name = random.choice(list(sent))
        match random.integers(6):
            case 0:
                engine.pause(name)
            case 1:
                engine.resume(name)
            case 2:
                index = None if random.integers(2) else int(random.integers(30))
                engine.update(name, index)
                sent[name].append(index)
        engine.step()
    for name in sent:
        engine.resume(name)
    engine.run()

    for name in sent:
        assert engine.tokens[name] == list(range(30))
        revisions = engine.revisions[name]
        assert revisions == sorted(revisions)
        assert len(engine.applied[name]) <= len(sent[name])
        for (revision, index), (_, stop) in pairwise([(0, 0), *engine.applied[name], (0, 30)]):
            asked = sent[name][revision - 1] if revision else 0
            assert revisions[index:stop] == [revision] * (stop - index)
            assert index >= (asked or 0) or index == stop
