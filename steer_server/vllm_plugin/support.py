"""Which vLLM, and which of its settings, edits work with; everything else is refused by name when the engine starts."""

from typing import Any

import torch
import vllm

from steer_server.errors import UnsupportedVllm
from steer_server.vllm_plugin import KEY

SUPPORTED_VLLM = ("0.30", "0.31", "0.32")


def check_supported(config: Any) -> None:
    """UnsupportedVllm names what this version of steer does not work with."""
    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in SUPPORTED_VLLM:
        raise UnsupportedVllm(
            f"vLLM {vllm.__version__} is not supported; install {' or '.join(SUPPORTED_VLLM)}"
        )
    parallel = config.parallel_config
    refused = {
        # Rows computed elsewhere were not edited here, and a connector need not tell salts apart.
        "KV connectors (--kv-transfer-config)": config.kv_transfer_config is not None,
        # It runs the worker's model runner, and not the worker.
        "Ray (--distributed-executor-backend ray)": parallel.distributed_executor_backend == "ray",
        # Each rank has a scheduler, and a pipeline's stages pass each other nothing that a step's reports could go with.
        "an external launcher (--distributed-executor-backend external_launcher)": (
            parallel.distributed_executor_backend == "external_launcher"
        ),
        # A draft that is rejected would have been edited, counted and reported.
        "speculative decoding": config.speculative_config is not None,
        # Each of its steps computes the same positions again, with other tokens.
        "diffusion language models": config.diffusion_config is not None
        or config.model_config.is_diffusion,
        # An update would have to find the engine that has its request.
        "data parallelism inside one server; run replicas": parallel.data_parallel_size > 1,
        # A step's reports go to one of them.
        "several API servers (--api-server-count); run replicas": parallel._api_process_count > 1,
        # These give the layers a part of the step's rows, or other rows.
        "dual-batch overlap": parallel.use_ubatching,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "fast prefill of shared KV": config.cache_config.kv_sharing_fast_prefill,
    }
    for what, found in refused.items():
        if found:
            raise UnsupportedVllm(f"edits do not work with {what} in this version")


def use_kernels(config: Any, device: torch.device) -> bool:
    """Whether Triton's kernels do the work: where CUDA graphs replay the op, nothing else can.

    `additional_config` may ask for them elsewhere, which is how they are tested without a GPU.
    """
    graphs = device.type == "cuda" and not config.model_config.enforce_eager
    return bool(config.additional_config[KEY].get("kernels", graphs))
