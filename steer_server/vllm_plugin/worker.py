"""What a vLLM worker with sites does beside vLLM's own work.

`worker_cpu` and `worker_cuda` mix it into vLLM's workers. They are modules of their own because importing vLLM's CPU
worker replaces CUDA's events, streams and pinned memory by stand-ins for the whole process (vllm/v1/worker/cpu/shm.py).
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.config import CompilationMode
from vllm.distributed import get_pp_group, get_tp_group

from steer_server.dictionary.site import Site
from steer_server.errors import EditNotApplied, EngineUnavailable, SteerError
from steer_server.vllm_plugin import KEY, layers, op, pipeline, runner_v1, runner_v2
from steer_server.vllm_plugin.eager import EagerModel
from steer_server.vllm_plugin.residents import Resident
from steer_server.vllm_plugin.runner import with_reports
from steer_server.vllm_plugin.runtime import Runtime, Step
from steer_server.vllm_plugin.sentinel import sentinel
from steer_server.vllm_plugin.support import check_supported, use_kernels

_log = logging.getLogger(__name__)

_UNMEASURED = 2**30
"""Bytes of a GPU for what vLLM's trial step has none of: log-probabilities of a prompt, read-outs."""


class SteerWorker:
    """Mixed in before vLLM's worker."""

    vllm_config: Any
    model_config: Any
    model_runner: Any
    device: Any

    def load_model(self, **options: Any) -> None:
        check_supported(self.vllm_config)
        super().load_model(**options)  # type: ignore[misc]
        settings = self.vllm_config.additional_config[KEY]
        sites = [Site.parse(text) for text in settings["sites"]]
        codes = [op.code(site) for site in sites]
        here = layers.attach(
            self.model_runner.get_model(),
            sites,
            self.model_config.get_total_num_hidden_layers(),
            lambda hidden, residual, number: op.call(hidden, residual, codes[number]),
            EagerModel(self.model_runner),
        )
        rows = self.vllm_config.scheduler_config.max_num_batched_tokens
        self.steer_sites = [sites.index(site) for site in here]
        self.steer = Runtime(
            sites,
            self.steer_sites,
            self.model_config.get_hidden_size(),
            settings["slots"],
            self.device,
            reports=get_tp_group().rank_in_group == 0,
            announces=get_pp_group().is_last_rank,
            kernel_rows=rows if use_kernels(self.vllm_config, self.device) else 0,
        )
        for name, folder, arithmetic in settings.get("dictionaries", ()):
            self.steer.residents.load(name, Path(folder), arithmetic)
        self._reader = ThreadPoolExecutor(1, "steer-reader")
        self._read: dict[str, Future[Resident | None]] = {}
        op.install(self.steer, sites)
        runner = runner_v2 if self.vllm_config.use_v2_model_runner else runner_v1
        runner.attach(self.model_runner, self.steer)
        self._arrived: list[Any] = []
        if get_pp_group().world_size > 1:
            pipeline.make_buffers(self.model_runner)
            self.model_runner.execute_model = pipeline.relay(
                self.model_runner, self._end_stage, self._arrived
            )

    def determine_available_memory(self) -> int:
        if self.device.type != "cuda":
            return super().determine_available_memory()  # type: ignore[misc]
        # It runs a step of as many rows as there may be, whether or not its result is wanted.
        torch.cuda.reset_peak_memory_stats(self.device)
        available = super().determine_available_memory()  # type: ignore[misc]
        peak = torch.cuda.max_memory_allocated(self.device)
        of_a_step = peak - torch.cuda.memory_allocated(self.device)
        self.steer.residents.kept_free = of_a_step + _UNMEASURED
        return available

    def compile_or_warm_up_model(self) -> Any:
        self.steer.warm_up()
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        eager = self.model_config.enforce_eager
        if self.device.type == "cpu":
            # An engine there that compiles nothing is not warmed up either.
            eager |= self.vllm_config.compilation_config.mode == CompilationMode.NONE
        for number in self.steer_sites:
            if not eager and self.steer.op_calls[number] == 0:
                raise EditNotApplied(
                    f"the warm-up of the compiled model never called the op of site number {number}"
                )
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        self.steer.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            parameters = request.sampling_params
            content = (parameters.extra_args or {}).get(KEY) if parameters else None
            if content is not None:
                self.steer.admit(request.req_id, content)
        for vllm_id, updates in getattr(scheduler_output, "steer_updates", {}).items():
            for program, first in updates:
                self.steer.update(vllm_id, program, first)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if not get_pp_group().is_last_rank:
            # Its report went with the hidden states; vLLM's empty output is one for all steps.
            return output
        step = self.steer.end_step()
        arrived, self._arrived[:] = list(self._arrived), []
        # None: the model has failed, and vLLM goes on to say with what.
        if output is None or (step is None and not arrived):
            return output
        return with_reports(output, partial(self._reports, arrived, step))

    def _reports(self, arrived: list[Any], step: Step | None) -> list[Any]:
        return [*arrived, *([] if step is None else [self.steer.report(step)])]

    def _end_stage(self) -> Any:
        """The report of a pipeline stage that is not the last."""
        step = self.steer.end_step()
        return None if step is None else self.steer.report(step)

    # Called by the engine through collective_rpc.

    def steer_read(self, name: str, folder: str, arithmetic: str) -> None:
        """Begins to read a dictionary while the model goes on; `steer_load` makes it resident."""
        self._read[name] = self._reader.submit(
            self.steer.residents.read, name, Path(folder), arithmetic
        )

    def steer_has_read(self, name: str) -> bool:
        return self._read[name].done()

    def steer_load(self, name: str) -> list[str]:
        """Empty, or the class and text of a SteerError.

        vLLM passes on the text of an exception only, and leaves what the ranks behind it have answered to its next call.
        """
        try:
            self.steer.residents.place(name, self._read.pop(name).result())
        except SteerError as error:
            return [type(error).__name__, str(error)]
        except Exception as error:
            _log.exception("dictionary %r was not loaded", name)
            return [EngineUnavailable.__name__, f"a worker did not load it: {error!r}"]
        return []

    def steer_sentinel(self, site: str) -> None:
        """Makes the self-test's direction resident at the site."""
        stored = sentinel(Site.parse(site), self.model_config.get_hidden_size())
        self.steer.residents.add(stored.card.name, stored.card.site, stored.dictionary)

    def steer_unload(self, name: str) -> None:
        self._read.pop(name, None)
        self.steer.unload(name)

    def steer_op_calls(self) -> list[int]:
        """How often the model called the op in this process, by site, warm-up included."""
        return self.steer.op_calls

    def steer_counts(self) -> dict[str, int]:
        """As `Runtime.counts`."""
        return self.steer.counts()
