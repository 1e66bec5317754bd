"""vLLM with programs: generate, update, abort. The only module beside `vllm_plugin` that imports vLLM."""

import asyncio
import math
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_server import __version__
from steer_server.dictionary.card import model_shape
from steer_server.dictionary.edits import AddRelative
from steer_server.dictionary.files import StoredDictionary, check_model
from steer_server.dictionary.site import Site
from steer_server.errors import (
    DictionaryMismatch,
    DictionaryNotFound,
    EditNotApplied,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    UnsupportedVllm,
)
from steer_server.generation import (
    Finish,
    FinishReason,
    Generation,
    Sampling,
    StepOutput,
    Tokenizer,
)
from steer_server.program import FeatureEdit, Program, ReadOut, Scope
from steer_server.vllm_plugin.account import Account
from steer_server.vllm_plugin.wire import KEY, StepResult, program_to_wire

MAX_REVISIONS = 256
_DEAD = "the engine has died; the server must be restarted"
_WORKERS = {
    "cpu": "steer_server.vllm_plugin.worker.SteerCPUWorker",
    "cuda": "steer_server.vllm_plugin.worker.SteerGPUWorker",
}


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
    kv_cache_gib: int = 4
    """On CPU; on CUDA vLLM takes its share of the device memory."""


@dataclass
class _Live:
    """A running generation whose program may be updated."""

    known: bool = False
    """The worker has begun it; before, it could not find the request."""
    deferred: list[Program] = field(default_factory=list)
    """Updates that came before."""


class VllmEngine:
    """The real `generation.Engine`."""

    def __init__(self, llm: AsyncLLM, settings: EngineSettings) -> None:
        config = llm.model_config
        self.model_id = str(config.model)
        self.max_model_len = int(config.max_model_len)
        self.tokenizer: Tokenizer = _Tokenizer(llm.get_tokenizer(), config.get_vocab_size())
        self._llm = llm
        self._stopped = False
        self._settings = settings
        self._model_config = model_shape(config.hf_text_config)
        self._dictionaries: dict[str, StoredDictionary] = {}
        self._accounts: dict[str, Account] = {}
        self._live: dict[str, _Live] = {}
        self._update_lock = asyncio.Lock()
        _intercept(llm, self._accounts)

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
        check_model(stored.card, self._model_config)
        if stored.card.site not in self._settings.sites:
            raise DictionaryMismatch(
                f"dictionary {name!r} is of site {stored.card.site}, the engine was started with "
                f"{', '.join(map(str, self._settings.sites))}; add the site to the settings and restart"
            )
        folder = str(stored.folder.resolve())
        await self._llm.collective_rpc("steer_load", args=(name, folder, stored.card.arithmetic))
        self._dictionaries[name] = stored

    async def self_test(self) -> None:
        """Writes with every dictionary and sees it in the output; EditNotApplied if not.

        It proves that the op runs and that its writes arrive, not that x is what the dictionary was trained on.
        """
        prompt = tuple(range(10, 18))
        plain = await self._first_logprob(prompt, Program())
        for name, stored in self._dictionaries.items():
            edit = FeatureEdit(name, AddRelative(0, 1.0), Scope(exclude_positions=frozenset()))
            program = Program((edit,), (ReadOut(name, top_k=1),))
            edited = await self._first_logprob(prompt, program)
            if edited == plain or not math.isfinite(edited):
                raise EditNotApplied(
                    f"self-test: an edit of dictionary {name!r} at {stored.card.site} did not reach the "
                    f"output: log-probability {plain} without it, {edited} with it"
                )

    async def generate(self, generation: Generation) -> AsyncIterator[StepOutput]:
        name, program = generation.request_id, generation.program
        self._check(program)
        if name in self._accounts:
            raise InvalidRequest(f"request id {name!r} is in use", field="request_id")
        account = Account(len(generation.prompt_token_ids), [program])
        self._accounts[name] = account
        if generation.live:
            self._live[name] = _Live()
        index = 0
        try:
            stream = self._llm.generate(self._prompt(generation), _parameters(generation), name)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    step = _step(output, index, account)
                    index += len(step.token_ids)
                    if generation.live:
                        await self._send_deferred(name)
                    yield step
        except EngineDeadError as error:
            raise EngineUnavailable(_DEAD) from error
        finally:
            self._accounts.pop(name, None)
            self._live.pop(name, None)

    async def update(self, request_id: str, program: Program) -> int:
        self._check(program)
        # Revisions reach the worker in the order in which they are counted.
        async with self._update_lock:
            live = self._live.get(request_id)
            if live is None:
                raise InvalidRequest(
                    f"generation {request_id!r} is not live or has ended; its edits cannot change"
                )
            account = self._accounts[request_id]
            if len(account.programs) > MAX_REVISIONS:
                raise Overloaded(
                    f"a generation takes at most {MAX_REVISIONS} updates; go on in a new one"
                )
            revision = account.add_revision(program)
            if not live.known:
                live.deferred.append(program)
            elif not await self._send(request_id, program):
                raise InvalidRequest(
                    f"generation {request_id!r} has ended; its edits cannot change"
                )
        return revision

    async def _send(self, request_id: str, program: Program) -> bool:
        """Whether the worker, who applies the update in its next step, still has the request."""
        content = program_to_wire(program)
        try:
            found = await self._llm.collective_rpc("steer_update", args=(request_id, content))
        except EngineDeadError as error:
            raise EngineUnavailable(_DEAD) from error
        return all(found)

    async def _send_deferred(self, request_id: str) -> None:
        live = self._live[request_id]
        if not live.known:
            async with self._update_lock:
                live.known = True
                for program in live.deferred:
                    await self._send(request_id, program)

    async def op_calls(self) -> int:
        """How often the model has called the op since it was loaded."""
        return (await self._llm.collective_rpc("steer_op_calls"))[0]

    async def shutdown(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._llm.shutdown()
            # vLLM shuts down once more when it is collected, which must not be at the interpreter's end.
            del self._llm

    def _check(self, program: Program) -> None:
        for entry in (*program.edits, *program.read_outs):
            if entry.dictionary not in self._dictionaries:
                raise DictionaryNotFound(f"no dictionary {entry.dictionary!r} is resident")

    def _prompt(self, generation: Generation) -> TokensPrompt:
        prompt = TokensPrompt(prompt_token_ids=list(generation.prompt_token_ids))
        hashes = {name: stored.card.arithmetic for name, stored in self._dictionaries.items()}
        nonce = uuid.uuid4().hex if generation.live else ""
        salt = generation.program.cache_salt(hashes, nonce)
        if salt is not None:
            prompt["cache_salt"] = salt
        return prompt

    async def _first_logprob(self, prompt: tuple[int, ...], program: Program) -> float:
        sampling = Sampling(max_tokens=1, temperature=0.0, logprobs=True)
        request_id = f"self-test-{uuid.uuid4().hex}"
        async for step in self.generate(Generation(request_id, prompt, sampling, program)):
            if program.read_outs and not any(len(rows.positions) for rows in step.activations):
                raise EditNotApplied("self-test: a read-out returned no rows")
            return step.logprobs[0]
        raise EngineUnavailable("self-test: the engine returned nothing")


class _Tokenizer:
    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._piece = lru_cache(maxsize=65536)(lambda token: tokenizer.decode([token]))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [self._piece(token) for token in token_ids]


def _engine_args(settings: EngineSettings) -> AsyncEngineArgs:
    worker = _WORKERS.get(current_platform.device_type)
    if worker is None:
        raise UnsupportedVllm(f"vLLM's platform {current_platform.device_type!r} is not served")
    optional: dict[str, Any] = {
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_model_len": settings.max_model_len,
    }
    return AsyncEngineArgs(
        model=settings.model,
        dtype=settings.dtype,  # type: ignore[arg-type]
        max_num_seqs=settings.max_num_seqs,
        enforce_eager=settings.enforce_eager,
        worker_cls=worker,
        scheduler_cls="steer_server.vllm_plugin.scheduler.SteerScheduler",
        async_scheduling=False,
        enable_log_requests=False,
        # Part of vLLM's compile-cache key. Without it vLLM would load a model compiled without the op.
        additional_config={KEY: {"sites": list(map(str, settings.sites)), "version": __version__}},
        **{key: value for key, value in optional.items() if value is not None},
    )


def _set_environment(settings: EngineSettings) -> None:
    """vLLM takes these from the environment only; what the operator has set stays."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)


def _intercept(llm: AsyncLLM, accounts: dict[str, Account]) -> None:
    """Takes the step results out of vLLM's outputs before it merges those of a slow reader."""
    processor = llm.output_processor
    process = processor.process_outputs

    def process_outputs(outputs: list[Any], *rest: Any, **named: Any) -> Any:
        for output in outputs:
            results = (output.kv_transfer_params or {}).pop(KEY, None)
            state = processor.request_states.get(output.request_id)
            if results is not None and state is not None:
                account = accounts.get(state.external_req_id)
                if account is not None:
                    account.receive(results)
        return process(outputs, *rest, **named)

    processor.process_outputs = process_outputs  # type: ignore[method-assign]


def _parameters(generation: Generation) -> SamplingParams:
    sampling, program = generation.sampling, generation.program
    extra: dict[str, Any] | None = None
    if program != Program() or generation.live:
        extra = {KEY: program_to_wire(program) | {"name": generation.request_id}}
    complete = any(entry.prompt and entry.complete for entry in program.read_outs)
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=list(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        logprobs=0 if sampling.logprobs else None,
        extra_args=extra,
        # Cached prompt tokens are never computed, so they could not be read.
        skip_reading_prefix_cache=True if complete else None,
        output_kind=RequestOutputKind.DELTA,
    )


def _step(output: Any, index: int, account: Account) -> StepOutput:
    completion = output.outputs[0]
    token_ids = tuple(completion.token_ids)
    results = account.take()
    logprobs = completion.logprobs or ()
    finish = None
    if output.finished:
        generated = index + len(token_ids)
        cached = output.num_cached_tokens or 0
        reason = FinishReason(completion.finish_reason)
        reports = account.close(generated) if reason is not FinishReason.ABORT else ()
        finish = Finish(reason, account.prompt_length, generated, cached, reports)
    return StepOutput(
        index,
        token_ids,
        completion.text,
        tuple(entry[token].logprob for entry, token in zip(logprobs, token_ids, strict=False)),
        tuple(rows for result in results for rows in result.rows),
        account.applied(results),
        _seconds(results),
        finish,
    )


def _seconds(results: Sequence[StepResult]) -> dict[str, float]:
    total: dict[str, float] = {}
    for result in results:
        for name, seconds in result.encode_seconds.items():
            total[name] = total.get(name, 0.0) + seconds
    return total
