"""What edits and read-outs cost: tokens/s as a ratio to plain vLLM, the same model and settings without the plugin.

The engines are up at once and take turns, round by round and in alternating order, so that a noisy machine is noisy
to both. Each of `ratios` is the median over rounds of (time of plain vLLM / time of the case): 1.00 is free, 0.95 costs
5 %. `null` is plain vLLM against itself in the same way: how far from 1.00 the machine's noise alone goes. One process
may be faster than another all its life, by where its memory lies: `idle` is steer's, without a program. `serve_idle` is
`vllm serve` with the plugin and a dictionary, and no request that asks for anything.

`without_own_time` is the same quantity by another clock, which noise hardly moves: 1 less the share of the case's time
in which steer's own code ran, in the engine's process and in the front-end's (see own_time.py, also for what it leaves
out).

    python benchmarks/serving_overhead.py --json build/serving_overhead.json

`--quick` takes two short rounds, to see that it runs. `--compiled` leaves torch.compile on (needs a C++ compiler).
`own_time_spread` is from the least to the greatest round of `without_own_time`.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import own_time
from common import add_engine_options, circumstances, measure, parser
from tqdm import tqdm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from steer_server.dictionary import files
from steer_server.dictionary.edits import AddRelative, Scale
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.generation import Generation, Sampling
from steer_server.program import FeatureEdit, Program, ReadOut
from steer_server.program_json import from_json, to_json
from steer_server.vllm_plugin import plugin

PROMPT_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS = 16, 1024, 64
NAME = "d"


class Workload(NamedTuple):
    requests: int
    prompt_tokens: int
    tokens: int


Case = Callable[[float], Sequence[Program]] | str
"""A program for each request, in turn, with strengths that are larger by the share given, so that no edits were ever seen
before; or which engine runs the requests without any."""
PLAIN, SERVE = "plain", "serve"


def cases() -> dict[str, Case]:
    """What requests ask for. Edits are on every row, and too small to change what vLLM does."""
    read_out = (ReadOut(NAME, top_k=32),)
    return {
        "null": PLAIN,
        "serve_idle": SERVE,
        "idle": lambda more: [Program()],
        "edit1": lambda more: [Program(edits(1, more))],
        "edit16": lambda more: [Program(edits(16, more))],
        "scale16": lambda more: [Program(scales(16, more))],
        "readout32": lambda more: [Program((), read_out)],
        "edit16_readout32": lambda more: [Program(edits(16, more), read_out)],
    }


def edits(count: int, more: float, first: int = 0) -> tuple[FeatureEdit, ...]:
    share = 0.01 * (1 + more)
    return tuple(
        FeatureEdit(NAME, AddRelative(feature, share)) for feature in range(first, first + count)
    )


def scales(count: int, more: float) -> tuple[FeatureEdit, ...]:
    """What adds, as `edits` do, need not know how active its feature is; these do."""
    factor = 1 + 0.001 * (1 + more)
    return tuple(FeatureEdit(NAME, Scale(feature, factor)) for feature in range(count))


LOADS = {
    "batch_1": (Workload(1, PROMPT_TOKENS, 32), cases()),
    "batch_16": (Workload(16, PROMPT_TOKENS, 32), cases()),
    "prompt_1x512": (Workload(1, 512, 1), cases()),
    "prompt_16x32": (Workload(16, 32, 1), cases()),
    "batch_64": (
        Workload(64, PROMPT_TOKENS, 24),
        # Each request edits other features by other strengths.
        {
            "null": PLAIN,
            "idle": lambda more: [Program()],
            "programs64": lambda more: [Program(edits(4, more, 4 * n)) for n in range(64)],
        },
    ),
}


class Bench:
    """The engines and a counter that keeps request ids and prompts new, so that no prefix is cached."""

    def __init__(self, vllm: dict[str, AsyncLLM], steer: VllmEngine) -> None:
        self.vllm, self.steer, self.count = vllm, steer, 0

    def _prompt(self, length: int) -> list[int]:
        self.count += 1
        return [1000 + (self.count * 7919 + i * 31) % 40000 for i in range(length)]

    async def time_vllm(self, load: Workload, engine: AsyncLLM) -> float:
        parameters = SamplingParams(
            max_tokens=load.tokens,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )

        async def one() -> None:
            prompt = TokensPrompt(prompt_token_ids=self._prompt(load.prompt_tokens))
            async for _ in engine.generate(prompt, parameters, f"p{self.count}"):
                pass

        return await _timed([one() for _ in range(load.requests)])

    async def time_case(self, load: Workload, case: Case) -> float:
        if isinstance(case, str):
            return await self.time_vllm(load, self.vllm[case])
        sampling = Sampling(max_tokens=load.tokens, temperature=0.0, ignore_eos=True)

        async def one(program: Program) -> None:
            prompt = tuple(self._prompt(load.prompt_tokens))
            generation = Generation(f"s{self.count}", prompt, sampling, program)
            async for _ in self.steer.generate(generation):
                pass

        # Each request brings an object of its own, as it comes from a client. Programs with edits are equal to others of
        # this batch at most; those without are equal in every batch.
        programs = case(1e-4 * self.count)
        asked = [
            from_json(to_json(programs[number % len(programs)])) for number in range(load.requests)
        ]
        return await _timed([one(program) for program in asked])

    async def ratios(
        self, load: Workload, cases: dict[str, Case], rounds: int, bar: tqdm
    ) -> dict[str, Any]:
        ratios: dict[str, list[float]] = {name: [] for name in cases}
        own: dict[str, list[float]] = {name: [] for name in cases}
        plain_times: list[float] = []
        for number in range(rounds + 1):
            for name in cases if number % 2 else reversed(cases):
                # Plain vLLM right before or right after each case: what is compared shares its minute.
                if number % 2:
                    plain = await self.time_case(load, PLAIN)
                before = await self._own_time()
                steered = await self.time_case(load, cases[name])
                spent = await self._own_time() - before
                if not number % 2:
                    plain = await self.time_case(load, PLAIN)
                if number:
                    ratios[name].append(plain / steered)
                    own[name].append(1 - spent / steered)
                    plain_times.append(plain)
                bar.update()
        produced = load.requests * (load.tokens if load.tokens > 1 else load.prompt_tokens)
        return {
            "ratios": {
                name: round(statistics.median(values), 3) for name, values in ratios.items()
            },
            "spread": {name: [round(min(v), 3), round(max(v), 3)] for name, v in ratios.items()},
            "without_own_time": {
                name: round(statistics.median(values), 4)
                for name, values in own.items()
                if not isinstance(cases[name], str)
            },
            "own_time_spread": {
                name: [round(min(v), 4), round(max(v), 4)]
                for name, v in own.items()
                if not isinstance(cases[name], str)
            },
            "plain_tokens_per_second": round(produced / statistics.median(plain_times), 1),
        }

    async def _own_time(self) -> float:
        engine = await self.steer._llm.collective_rpc(own_time.seconds)
        return own_time.seconds() + sum(engine)


async def _timed(jobs: Sequence[Any]) -> float:
    began = time.perf_counter()
    await asyncio.gather(*jobs)
    return time.perf_counter() - began


async def main(options: argparse.Namespace) -> dict[str, Any]:
    stored = files.load(options.dictionary)
    settings = EngineSettings(
        str(options.model),
        (stored.card.site,),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        dtype="float32",
        enforce_eager=not options.compiled,
        kv_cache_gib=1,
    )
    arguments = AsyncEngineArgs(
        model=str(options.model),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        dtype="float32",
        enforce_eager=not options.compiled,
    )
    # Functions of `own_time` are sent to the engine's process.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # vLLM loads the plugin once in a process, so the engine that knows nothing of it comes first.
    os.environ[plugin.DISABLE] = "1"
    plain = AsyncLLM.from_engine_args(arguments)
    del os.environ[plugin.DISABLE]
    plugin.register()
    os.environ[plugin.DICTIONARIES] = f"{NAME}={options.dictionary}"
    serve = AsyncLLM.from_engine_args(arguments)
    steer = await VllmEngine.start(settings)
    await steer.add_dictionary(NAME, stored)
    await steer._llm.collective_rpc(own_time.watch_worker)
    own_time.watch_frontend()
    bench = Bench({PLAIN: plain, SERVE: serve}, steer)
    rounds = 2 if options.quick else options.rounds
    loads = {
        name: (load._replace(tokens=min(load.tokens, 8)) if options.quick else load, asked)
        for name, (load, asked) in LOADS.items()
        if name in (options.loads or LOADS)
    }
    result: dict[str, Any] = {
        **circumstances(options),
        "n_features": stored.card.n_features,
        "compiled": options.compiled,
        "rounds": rounds,
    }
    pairs = (rounds + 1) * sum(len(asked) for _, asked in loads.values())
    with tqdm(total=pairs, unit="pair") as bar:
        for name, (load, asked) in loads.items():
            bar.set_description(name)
            result[name] = await bench.ratios(load, asked, rounds, bar)
    plain.shutdown()
    serve.shutdown()
    await steer.shutdown()
    return result


if __name__ == "__main__":
    # vLLM starts its processes by importing this file again.
    options = parser(__doc__, rounds=9)
    add_engine_options(options)
    options.add_argument("--loads", nargs="+", choices=LOADS, help="only these (default: all)")
    measure(options.parse_args(), main)
