"""The engine names this worker as vLLM's `worker_cls` on CUDA."""

from vllm.v1.worker.gpu_worker import Worker

from steer_server.vllm_plugin.worker import SteerWorker


class SteerGPUWorker(SteerWorker, Worker):
    """For CUDA."""
