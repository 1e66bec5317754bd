"""Everything that knows the insides of vLLM."""

KEY = "steer"
"""Under which a program travels in `SamplingParams.extra_args`, the sites in vLLM's `additional_config`, and reports
in `EngineCoreOutput.kv_transfer_params`."""

WORKERS = {
    "cpu": "steer_server.vllm_plugin.worker_cpu.SteerCPUWorker",
    "cuda": "steer_server.vllm_plugin.worker_cuda.SteerGPUWorker",
}
"""vLLM's `worker_cls`, by the type of its platform's device."""
