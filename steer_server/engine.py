"""vLLM with programs: generate, update, pause, abort. The only module beside `vllm_plugin` that imports vLLM."""

import asyncio
import math
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from steer_server import __version__, errors
from steer_server.dictionary.card import model_shape
from steer_server.dictionary.edits import Clamp
from steer_server.dictionary.files import StoredDictionary, check_model, check_served
from steer_server.dictionary.site import Site
from steer_server.errors import (
    DictionaryInUse,
    DictionaryMismatch,
    EditNotApplied,
    EngineUnavailable,
    InvalidRequest,
    NameTaken,
    SteerError,
    UnsupportedVllm,
)
from steer_server.generation import (
    EditReport,
    Generation,
    Sampling,
    SlotLoad,
    StepOutput,
    Tokenizer,
)
from steer_server.program import FeatureEdit, Program, ReadOut, Scope
from steer_server.tokenizer import ModelTokenizer
from steer_server.vllm_plugin import KEY, WORKERS, exchange
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.frontend import Frontend, attach
from steer_server.vllm_plugin.sentinel import sentinel

_SENTINEL = 50.0
"""An activation that no model has by chance in a random direction."""
_TEST_PROMPT = tuple(range(10, 18))
_READ_CHECK_SECONDS = 0.02
_DEAD = "the engine has died; the server must be restarted"


@dataclass(frozen=True)
class EngineSettings:
    """How to start the engine."""

    model: str
    """A Hugging Face folder or hub id."""
    sites: tuple[Site, ...]
    """Where the model is prepared for edits; dictionaries of other sites cannot be added later."""
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    dtype: str = "auto"
    enforce_eager: bool = False
    """Skip torch.compile: starts sooner and needs no C++ compiler."""
    async_scheduling: bool | None = None
    """Schedule a step while the one before is running; None leaves it to vLLM."""
    kv_cache_gib: int = 4
    """Of each process on CPU; on CUDA it is what vLLM's share of the memory leaves."""
    gpu_memory_utilization: float | None = None
    """vLLM's share of a GPU's memory, model and KV cache together; the rest is for dictionaries. None: vLLM's default."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    edit_slots: int = 1024
    """Features that running requests may edit at a site, all together; more wait their turn."""


class VllmEngine:
    """The real `generation.Engine`."""

    def __init__(self, llm: AsyncLLM, settings: EngineSettings) -> None:
        config = llm.model_config
        self.model_id = str(config.model)
        self.max_model_len = int(config.max_model_len)
        self.tokenizer: Tokenizer = ModelTokenizer(llm.get_tokenizer(), config.get_vocab_size())
        self._llm = llm
        self._stopped = False
        self._settings = settings
        self.max_num_seqs = settings.max_num_seqs
        self.workers = settings.tensor_parallel_size * settings.pipeline_parallel_size
        self.d_model = int(config.get_hidden_size())
        self.self_test_passed = False
        self._model_config = model_shape(config.hf_text_config)
        self._frontend = Frontend(settings.sites, settings.edit_slots, self._opened)
        self._running: set[str] = set()
        self._accounts: dict[str, Account] = {}
        """Of the running generations with a program."""
        self._live: dict[str, asyncio.Event] = {}
        """Generations that may be updated or paused; the event says that vLLM has taken the request in."""
        self._control_lock = asyncio.Lock()
        attach(llm.output_processor, self._frontend)

    @classmethod
    async def start(cls, settings: EngineSettings) -> Self:
        """Loads the model with its sites; takes 20 s and more. Raises what vLLM raises, in words."""
        _set_environment(settings)
        try:
            llm = AsyncLLM.from_engine_args(_engine_args(settings))
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineUnavailable(
                f"vLLM did not start with model {settings.model!r}: {error}; its log above says more"
            ) from error
        return cls(llm, settings)

    @property
    def alive(self) -> bool:
        return not self._stopped and self._llm.is_running and not self._llm.errored

    async def add_dictionary(self, name: str, stored: StoredDictionary) -> None:
        check_served(stored.card)
        check_model(stored.card, self._model_config)
        if stored.card.site not in self._settings.sites:
            raise DictionaryMismatch(
                f"dictionary {name!r} is of site {stored.card.site}, the engine was started with "
                f"{', '.join(map(str, self._settings.sites))}; add the site to the settings and restart"
            )
        if name in self._frontend.admission.dictionaries:
            raise NameTaken(f"a dictionary {name!r} is resident")
        folder = str(stored.folder.resolve())
        try:
            await self._rpc("steer_read", name, folder, stored.card.arithmetic)
            while not all(await self._rpc("steer_has_read", name)):
                await asyncio.sleep(_READ_CHECK_SECONDS)
            for failure in filter(None, await self._rpc("steer_load", name)):
                kind, message = failure
                raise getattr(errors, kind)(message)
        except BaseException:
            with suppress(EngineUnavailable):
                await self._rpc("steer_unload", name)
            raise
        self._frontend.admission.add(name, stored)

    async def remove_dictionary(self, name: str) -> None:
        users = sum(
            any(name in program.dictionaries() for program in account.programs)
            for account in self._accounts.values()
        )
        if users:
            raise DictionaryInUse(f"{users} running requests name dictionary {name!r}")
        # Admission looks here: from now on no request can name it.
        self._frontend.admission.remove(name)
        await self._rpc("steer_unload", name)

    @property
    def slot_load(self) -> SlotLoad:
        return self._frontend.load

    async def self_test(self) -> None:
        """Writes a sentinel at every site, reads it back and sees it in the output; EditNotApplied if not.

        It proves that the model, as compiled, calls the op at each site, that what is read there is what is written,
        and that later layers see it.
        """
        admission = self._frontend.admission
        for site in self._settings.sites:
            stored = sentinel(site, self.d_model)
            name = stored.card.name
            await self._rpc("steer_sentinel", str(site))
            admission.add(name, stored)
            try:
                await self._test_site(name, site)
            finally:
                admission.remove(name)
                await self._rpc("steer_unload", name)
        self.self_test_passed = True

    async def _test_site(self, name: str, site: Site) -> None:
        reads = (ReadOut(name, features=(0,)), ReadOut(name, features=(0,), edited=True))
        everywhere = Scope(exclude_positions=frozenset())
        edit = FeatureEdit(name, Clamp(0, _SENTINEL), everywhere)
        plain, _ = await self._first_token(Program())
        edited, found = await self._first_token(Program((edit,), reads))
        before, after = (found.get(read_out, []) for read_out in (0, 1))
        wrong = [value for value in after[1:] if abs(value - _SENTINEL) > 0.1 * _SENTINEL]
        if wrong or len(after) != len(_TEST_PROMPT) or before == after:
            raise EditNotApplied(
                f"self-test: {_SENTINEL} was written at {site}, {after} was read there, {before} before it"
            )
        if edited == plain or not math.isfinite(edited):
            raise EditNotApplied(
                f"self-test: an edit at {site} did not reach the output: log-probability {plain} without it, "
                f"{edited} with it"
            )

    async def generate(self, generation: Generation) -> AsyncIterator[StepOutput]:
        name = generation.request_id
        if name in self._running:
            raise InvalidRequest(f"request id {name!r} is in use", field="request_id")
        self._running.add(name)
        if generation.live:
            self._live[name] = asyncio.Event()
        index = 0
        try:
            prompt = TokensPrompt(prompt_token_ids=list(generation.prompt_token_ids))
            stream = self._llm.generate(
                prompt,
                exchange.parameters(generation),
                name,
                trace_headers=generation.trace_headers or None,
            )
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    step = exchange.step(output, index, generation.forced, self._accounts.get(name))
                    index += len(step.token_ids)
                    yield step
        except EngineDeadError as error:
            raise EngineUnavailable(_DEAD) from error
        except EngineGenerateError as error:
            # What admission says, as vLLM passes it on.
            if isinstance(error.__cause__, SteerError):
                raise error.__cause__ from None
            raise
        finally:
            self._running.discard(name)
            self._accounts.pop(name, None)
            if name in self._live:
                self._live.pop(name).set()

    def so_far(self, request_id: str) -> tuple[tuple[EditReport, ...], int]:
        account = self._accounts.get(request_id)
        return (account.close(), account.limited_tokens) if account else ((), 0)

    async def update(self, request_id: str, program: Program, at_index: int | None = None) -> int:
        async with self._control(request_id):
            revision, message = self._frontend.update(request_id, program, at_index)
            await self._send(message)
        return revision

    async def pause(self, request_id: str) -> None:
        async with self._control(request_id):
            await self._send(self._frontend.pause(request_id, True))

    async def resume(self, request_id: str) -> None:
        async with self._control(request_id):
            await self._send(self._frontend.pause(request_id, False))

    @asynccontextmanager
    async def _control(self, request_id: str) -> AsyncIterator[None]:
        """Within it the generation is live, and vLLM has it. Messages reach the scheduler in the order they are made."""
        if request_id in self._live:
            await self._live[request_id].wait()
        async with self._control_lock:
            if request_id not in self._live:
                raise InvalidRequest(
                    f"generation {request_id!r} is not live or has ended; it cannot be changed or paused"
                )
            yield

    async def _send(self, message: EngineCoreRequest) -> None:
        try:
            await self._llm.engine_core.add_request_async(message)
        except EngineDeadError as error:
            raise EngineUnavailable(_DEAD) from error

    async def op_calls(self) -> list[int]:
        """How often the model has called the op since it was loaded, by site."""
        return (await self._rpc("steer_op_calls"))[0]

    async def shutdown(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._llm.shutdown()
            # vLLM shuts down once more when it is collected, which must not be at the interpreter's end.
            del self._llm

    async def _rpc(self, method: str, *arguments: str) -> list[Any]:
        """What each worker answers."""
        try:
            return await self._llm.collective_rpc(method, args=arguments)
        except EngineDeadError as error:
            raise EngineUnavailable(_DEAD) from error

    def _opened(self, name: str, account: Account) -> None:
        if name in self._running:
            self._accounts[name] = account
        if name in self._live:
            self._live[name].set()

    async def _first_token(self, program: Program) -> tuple[float, dict[int, list[float]]]:
        """The log-probability of the first token, and the values read by read-out."""
        sampling = Sampling(max_tokens=1, temperature=0.0, logprobs=True)
        request_id = f"self-test-{uuid.uuid4().hex}"
        found: dict[int, list[float]] = {}
        async for step in self.generate(Generation(request_id, _TEST_PROMPT, sampling, program)):
            for rows in step.activations:
                found.setdefault(rows.read_out, []).extend(rows.values.tolist())
            return step.logprobs[0], found
        raise EngineUnavailable("self-test: the engine returned nothing")


def _engine_args(settings: EngineSettings) -> AsyncEngineArgs:
    worker = WORKERS.get(current_platform.device_type)
    if worker is None:
        raise UnsupportedVllm(f"vLLM's platform {current_platform.device_type!r} is not served")
    optional: dict[str, Any] = {
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_model_len": settings.max_model_len,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }
    return AsyncEngineArgs(
        model=settings.model,
        dtype=settings.dtype,  # type: ignore[arg-type]
        max_num_seqs=settings.max_num_seqs,
        enforce_eager=settings.enforce_eager,
        async_scheduling=settings.async_scheduling,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        worker_cls=worker,
        scheduler_cls="steer_server.vllm_plugin.scheduler.scheduler",
        max_logprobs=-1,
        enable_log_requests=False,
        # Part of vLLM's compile-cache key. Without it vLLM would load a model compiled without the op.
        additional_config={
            KEY: {
                "sites": list(map(str, settings.sites)),
                "slots": settings.edit_slots,
                "version": __version__,
            }
        },
        **{key: value for key, value in optional.items() if value is not None},
    )


def _set_environment(settings: EngineSettings) -> None:
    """vLLM takes these from the environment only; what the operator has set stays."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
    cores = sorted(os.sched_getaffinity(0))
    ranks = settings.tensor_parallel_size * settings.pipeline_parallel_size
    shares = [",".join(map(str, cores[rank::ranks])) for rank in range(ranks)]
    bound = "|".join(shares) if ranks <= len(cores) else "nobind"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)
