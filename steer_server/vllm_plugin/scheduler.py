"""vLLM's scheduler with two more duties: slots are given to programs, and reports travel with the tokens."""

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from steer_server.vllm_plugin import KEY
from steer_server.vllm_plugin.bank import Slots

Content = dict[str, Any]


class _Steering:
    """Mixed in before one of vLLM's schedulers.

    A request whose features find no free slot is held back, in order of arrival, until others have ended: it waits
    like one that finds no KV blocks. Updates reach every worker with the same step.
    """

    requests: dict[str, Request]

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        settings = self.vllm_config.additional_config[KEY]  # type: ignore[attr-defined]
        self._slots = [Slots(settings["slots"]) for _ in settings["sites"]]
        self._held: deque[Request] = deque()
        self._contents: dict[str, list[Content]] = {}
        """By request with a program: what it has acquired slots for."""
        self._updates: dict[str, deque[Content]] = defaultdict(deque)
        """By request: those that no step has carried yet."""
        self._reports: list[Any] = []

    def add_request(self, request: Request) -> None:
        parameters = request.sampling_params
        content = (parameters.extra_args or {}).get(KEY) if parameters else None
        if content is None:
            super().add_request(request)  # type: ignore[misc]
        elif "update" in content:
            if content["update"] in self._contents or self._is_held(content["update"]):
                self._updates[content["update"]].append(content)
        else:
            self._held.append(request)
            self._admit_held()

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
        return len(self._held) + sum(map(len, self._updates.values()))

    def _is_held(self, request_id: str) -> bool:
        return any(request.request_id == request_id for request in self._held)

    def _admit_held(self) -> None:
        while self._held:
            request = self._held[0]
            content = request.sampling_params.extra_args[KEY]  # type: ignore[union-attr]
            if not self._acquire(content):
                return
            self._held.popleft()
            self._contents[request.request_id] = [content]
            super().add_request(request)  # type: ignore[misc]

    def _due(self, scheduled: dict[str, int]) -> dict[str, list[Content]]:
        """The updates that hold from this step on."""
        due: dict[str, list[Content]] = {}
        for request_id in self._updates.keys() & scheduled.keys():
            queue = self._updates[request_id]
            while queue and self._acquire(queue[0]):
                content = queue.popleft()
                self._contents[request_id].append(content)
                due.setdefault(request_id, []).append(content["program"])
            if not queue:
                del self._updates[request_id]
        return due

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
        if ended:
            self._admit_held()


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
