"""Puts vLLM on a CPU into modes that it keeps for GPUs, in every process that starts with this folder on PYTHONPATH.

Python imports a module of this name before anything else, in vLLM's child processes too. STEER_TEST_VLLM names the
modes, with commas between them:

- v2: the V2 model runner, its Triton kernels run by Triton's interpreter (slow);
- async: async scheduling, where the engine asks for it;
- kernels: steer's own Triton kernels, run by Triton's interpreter; the engine's fixture asks for them;
- piecewise: compilation by VLLM_COMPILE, the graph split at the attention ops;
- unsalted: vLLM's compile-cache key does not see the sites.
"""

import importlib.abc
import importlib.util
import os
import sys

MODES = set(filter(None, os.environ.get("STEER_TEST_VLLM", "").split(",")))
if unknown := MODES - {"v2", "async", "kernels", "piecewise", "unsalted"}:
    raise SystemExit(f"STEER_TEST_VLLM: no such mode: {', '.join(sorted(unknown))}")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Changes modules as soon as they are imported, wherever that happens."""

    def __init__(self, changes):
        self._changes = changes

    def find_spec(self, name, path, target=None):
        change = self._changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


class _ActiveDriver:
    @staticmethod
    def is_active():
        return True

    @staticmethod
    def get_current_target():
        # What torch's inductor takes for an answer: it generates C++ on CPU, and no Triton.
        raise RuntimeError("nothing is compiled for it")


class _InterpretedBackend:
    """What vLLM's check of Triton wants to see of a CPU backend (vllm/triton_utils/importing.py)."""

    compiler = None
    driver = _ActiveDriver


def _add_cpu_backend(triton_backends):
    triton_backends.backends["cpu"] = _InterpretedBackend


def _take_any_mask(interpreter):
    """Compiled kernels take a mask for what its type says; interpreted ones want its array to be of booleans, too.

    vLLM's kernel that applies a grammar has one of integers, made of a scalar comparison and a block.
    """
    store = interpreter.InterpreterBuilder.create_masked_store

    def create_masked_store(self, pointers, value, mask, cache_policy):
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, cache_policy)

    interpreter.InterpreterBuilder.create_masked_store = create_masked_store


def _keep_config(cpu):
    """vLLM's CPU platform switches both modes off; the rest of what it does stays."""
    check = cpu.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        compilation, scheduler = config.compilation_config, config.scheduler_config
        mode, async_scheduling = compilation.mode, scheduler.async_scheduling
        check(cls, config)
        if "async" in MODES:
            scheduler.async_scheduling = async_scheduling
        if "piecewise" in MODES and compilation.mode != mode:
            compilation.mode = mode
            compilation.backend = "inductor"
            compilation.compile_sizes = []

    cpu.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _forget_sites(vllm_config):
    compute = vllm_config.VllmConfig.compute_hash

    def compute_hash(self):
        additional, self.additional_config = self.additional_config, {}
        try:
            return compute(self)
        finally:
            self.additional_config = additional

    vllm_config.VllmConfig.compute_hash = compute_hash


def _skip_pass(fix_functionalization):
    # It names ops that only CUDA builds have; inductor does without it.
    fix_functionalization.FixFunctionalizationPass.__call__ = lambda self, graph: None


if MODES & {"v2", "kernels"}:
    os.environ["TRITON_INTERPRET"] = "1"
if "v2" in MODES:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
if "v2" in MODES and "piecewise" not in MODES:
    # vLLM compiles some functions in eager engines, too.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
if MODES:
    changes = {"vllm.platforms.cpu": _keep_config}
    if "v2" in MODES:
        changes["triton.backends"] = _add_cpu_backend
        changes["triton.runtime.interpreter"] = _take_any_mask
    if "piecewise" in MODES:
        changes["vllm.compilation.passes.utility.fix_functionalization"] = _skip_pass
    if "unsalted" in MODES:
        changes["vllm.config.vllm"] = _forget_sites
    sys.meta_path.insert(0, _AfterImport(changes))
