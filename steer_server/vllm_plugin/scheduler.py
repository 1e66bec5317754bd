"""vLLM's scheduler with three more duties: slots are given to programs, live requests are changed and paused, and reports
travel with the tokens."""

import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from steer_server.vllm_plugin import KEY
from steer_server.vllm_plugin.bank import Slots

Content = dict[str, Any]
Update = tuple[str, int]
"""A program as JSON, and the first position it may hold at."""


class _Steering:
    """Mixed in before one of vLLM's schedulers.

    A request whose features find no free slot is held back, and those with features that come after it, until others
    have ended: it waits like one that finds no KV blocks. Updates reach every worker with the same step. A paused request
    is preempted, and kept out of vLLM's queues until it goes on.
    """

    requests: dict[str, Request]
    running: list[Request]
    waiting: RequestQueue

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        settings = self.vllm_config.additional_config[KEY]  # type: ignore[attr-defined]
        self._slots = [Slots(settings["slots"]) for _ in settings["sites"]]
        self._held: deque[Request] = deque()
        self._contents: dict[str, list[Content]] = {}
        """By request with a program: what it has acquired slots for."""
        self._updates: dict[str, deque[Content]] = defaultdict(deque)
        """By request: those that no step has carried yet."""
        self._pausing: set[str] = set()
        """Requests that the next step is to leave out."""
        self._paused: dict[str, Request] = {}
        """Those that are in none of vLLM's queues."""
        self._reports: list[Any] = []

    def add_request(self, request: Request) -> None:
        parameters = request.sampling_params
        content = (parameters.extra_args or {}).get(KEY) if parameters else None
        if content is None:
            super().add_request(request)  # type: ignore[misc]
        elif "update" in content:
            if content["update"] in self._contents or self._is_held(content["update"]):
                self._updates[content["update"]].append(content)
        elif "pause" in content:
            if content["paused"]:
                self._pausing.add(content["pause"])
            else:
                self._resume(content["pause"])
        elif content["features"]:
            self._held.append(request)
            self._admit_held()
        else:
            # A read-out needs no slots, and waits for none.
            self._admit(request, content)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> Any:
        if request_ids is not None:
            request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        gone = [r for r in self._held if request_ids is None or r.request_id in request_ids]
        for request in gone:
            self._held.remove(request)
            self._updates.pop(request.request_id, None)
            # vLLM says that a request was aborted only of those it knows.
            super().add_request(request)  # type: ignore[misc]
        finished = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        self._release_ended()
        if gone:
            # They may have been all that kept others from slots.
            self._admit_held()
        return finished

    def schedule(self, *args: Any, **named: Any) -> SchedulerOutput:
        if self._pausing:
            self._pause()
        output = super().schedule(*args, **named)  # type: ignore[misc]
        if self._updates:
            output.steer_updates = self._due(output.num_scheduled_tokens)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self._reports += getattr(model_runner_output, KEY, ())
        if self._contents:
            self._release_ended()
        if self._reports:
            self._send(outputs)
        return outputs

    def _send(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """One copy for the whole step, on the first token that leaves; without one it waits for the next step."""
        for group in outputs.values():
            for output in group.outputs:
                load = [slots.used for slots in self._slots], self._waiting
                content = {"reports": self._reports, "load": load}
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: content}
                self._reports = []
                return

    @property
    def _waiting(self) -> int:
        """Requests and updates that wait for slots, not for their token."""
        count = len(self._held)
        for request_id, queue in self._updates.items():
            request = self.requests.get(request_id)
            stop = request.num_computed_tokens if request else 1
            count += sum(content["first"] < stop for content in queue)
        return count

    def _is_held(self, request_id: str) -> bool:
        return any(request.request_id == request_id for request in self._held)

    def _admit_held(self) -> None:
        while self._held:
            request = self._held[0]
            content = request.sampling_params.extra_args[KEY]  # type: ignore[union-attr]
            if not self._acquire(content):
                return
            self._held.popleft()
            self._admit(request, content)

    def _admit(self, request: Request, content: Content) -> None:
        self._contents[request.request_id] = [content]
        super().add_request(request)  # type: ignore[misc]

    def _due(self, scheduled: dict[str, int]) -> dict[str, list[Update]]:
        """The updates that take hold in the step that was just scheduled."""
        due: dict[str, list[Update]] = {}
        for request_id in self._updates.keys() & scheduled.keys():
            queue = self._updates[request_id]
            # vLLM counts the step's tokens as computed already, those under way and not yet known included.
            stop = self.requests[request_id].num_computed_tokens
            while (number := self._next_due(queue, stop)) is not None:
                content = queue[number]
                for _ in range(number + 1):
                    queue.popleft()
                self._contents[request_id].append(content)
                found = due.setdefault(request_id, [])
                # Those that it replaces keep the count of revisions, and hold nowhere.
                found += [("{}", content["first"])] * number
                found.append((content["program"], content["first"]))
            if not queue:
                del self._updates[request_id]
        return due

    def _next_due(self, queue: Iterable[Content], stop: int) -> int | None:
        """Which update is the first that may hold at a position before `stop` and finds its slots, which it then has.

        One that takes fewer features out of a program, or all, does not wait for one before it that asks for more.
        """
        for number, content in enumerate(queue):
            if content["first"] < stop and self._acquire(content):
                return number
        return None

    def _pause(self) -> None:
        """Takes what is to pause out of vLLM's queues, between two steps."""
        for request_id in self._pausing & self.requests.keys():
            self._pausing.discard(request_id)
            request = self.requests[request_id]
            if request.status == RequestStatus.RUNNING:
                self.running.remove(request)
                # Its blocks are freed once the steps under way are done with them, and the tokens of those still count.
                self._preempt_request(request, time.monotonic())  # type: ignore[attr-defined]
            for queue in _queues(self):
                queue.remove_requests({request})
            _deferred(self).discard(request)
            self._paused[request_id] = request
        self._pausing &= {request.request_id for request in self._held}

    def _resume(self, request_id: str) -> None:
        self._pausing.discard(request_id)
        request = self._paused.pop(request_id, None)
        if request is None:
            return
        if request.status == RequestStatus.PREEMPTED:
            self.waiting.prepend_request(request)
        else:
            self._enqueue_waiting_request(request)  # type: ignore[attr-defined]

    def _acquire(self, content: Content) -> bool:
        wanted: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for site, name, feature in content["features"]:
            wanted[site].append((name, feature))
        if not all(self._slots[site].fits(features) for site, features in wanted.items()):
            return False
        for site, features in wanted.items():
            self._slots[site].acquire(features)
        return True

    def _release_ended(self) -> None:
        ended = self._contents.keys() - self.requests.keys()
        for request_id in ended:
            for content in self._contents.pop(request_id):
                for site, name, feature in content["features"]:
                    self._slots[site].release([(name, feature)])
            self._updates.pop(request_id, None)
            self._pausing.discard(request_id)
            self._paused.pop(request_id, None)
        if ended:
            self._admit_held()


def _queues(scheduler: Any) -> list[Any]:
    """Where vLLM keeps requests that wait, 0.30 in the first two, 0.31 and 0.32 in the first and the last."""
    names = "waiting", "skipped_waiting", "kv_holding_waiting"
    return [getattr(scheduler, name) for name in names if hasattr(scheduler, name)]


def _deferred(scheduler: Any) -> set[Request]:
    """Which of them vLLM from 0.31 on cannot schedule for the time being."""
    return getattr(scheduler, "deferred_waiting", set())


class _SteerScheduler(_Steering, Scheduler):
    """Waits for each step's tokens before it schedules the next."""


class _SteerAsyncScheduler(_Steering, AsyncScheduler):
    """Schedules a step while the one before is running."""


def scheduler(vllm_config: Any, **named: Any) -> Scheduler:
    """vLLM's scheduler for this configuration; the engine names this function as `scheduler_cls`.

    vLLM decides on async scheduling after it has taken the class's name.
    """
    asynchronous = vllm_config.scheduler_config.async_scheduling
    chosen = _SteerAsyncScheduler if asynchronous else _SteerScheduler
    return chosen(vllm_config=vllm_config, **named)
