"""What edits and read-outs cost: tokens/s as a ratio to plain vLLM, the same model and settings without the plugin.

Both engines are up at once and take turns, round by round and in alternating order, so that a noisy machine is noisy
to both. Each figure is the median over rounds of (time of plain vLLM / time of the case): 1.00 is free, 0.95 costs 5 %.
`null` is plain vLLM against itself in the same way: how far from 1.00 the machine's noise alone goes.

    python benchmarks/serving_overhead.py --json build/serving_overhead.json

`--quick` takes two short rounds, to see that it runs. `--compiled` leaves torch.compile on (needs a C++ compiler).
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from common import add_engine_options, circumstances, measure, parser
from tqdm import tqdm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from steer_server.dictionary import files
from steer_server.dictionary.edits import AddRelative
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.generation import Generation, Sampling
from steer_server.program import FeatureEdit, Program, ReadOut

PROMPT_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS = 32, 1024, 64
NAME = "d"


class Workload(NamedTuple):
    requests: int
    prompt_tokens: int
    tokens: int


Programs = Sequence[Program]
"""One for each request, in turn."""


def cases() -> dict[str, Programs | None]:
    """What requests ask for; None is plain vLLM. Edits are on every row, and too small to change what vLLM does."""
    read_out = (ReadOut(NAME, top_k=32),)
    return {
        "null": None,
        "idle": [Program()],
        "edit1": [Program(edits(1))],
        "edit16": [Program(edits(16))],
        "readout32": [Program((), read_out)],
        "edit16_readout32": [Program(edits(16), read_out)],
    }


def edits(count: int, first: int = 0) -> tuple[FeatureEdit, ...]:
    return tuple(
        FeatureEdit(NAME, AddRelative(feature, 0.01)) for feature in range(first, first + count)
    )


LOADS = {
    "batch_1": (Workload(1, PROMPT_TOKENS, 24), cases()),
    "batch_16": (Workload(16, PROMPT_TOKENS, 24), cases()),
    "prompt_1x512": (Workload(1, 512, 1), cases()),
    "prompt_4x256": (Workload(4, 256, 1), cases()),
    "batch_64": (
        Workload(64, PROMPT_TOKENS, 16),
        # Each request edits other features by other strengths.
        {"null": None, "programs64": [Program(edits(4, 4 * number)) for number in range(64)]},
    ),
}


class Bench:
    """Two engines and a counter that keeps request ids and prompts new, so that no prefix is cached."""

    def __init__(self, plain: AsyncLLM, steer: VllmEngine) -> None:
        self.plain, self.steer, self.count = plain, steer, 0

    def _prompt(self, length: int) -> list[int]:
        self.count += 1
        return [1000 + (self.count * 7919 + i * 31) % 40000 for i in range(length)]

    async def time_plain(self, load: Workload) -> float:
        parameters = SamplingParams(
            max_tokens=load.tokens,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )

        async def one() -> None:
            prompt = TokensPrompt(prompt_token_ids=self._prompt(load.prompt_tokens))
            async for _ in self.plain.generate(prompt, parameters, f"p{self.count}"):
                pass

        return await _timed([one() for _ in range(load.requests)])

    async def time_case(self, load: Workload, programs: Programs | None) -> float:
        if programs is None:
            return await self.time_plain(load)
        sampling = Sampling(max_tokens=load.tokens, temperature=0.0, ignore_eos=True)

        async def one(program: Program) -> None:
            prompt = tuple(self._prompt(load.prompt_tokens))
            generation = Generation(f"s{self.count}", prompt, sampling, program)
            async for _ in self.steer.generate(generation):
                pass

        asked = [programs[number % len(programs)] for number in range(load.requests)]
        return await _timed([one(program) for program in asked])

    async def ratios(
        self, load: Workload, cases: dict[str, Programs | None], rounds: int, bar: tqdm
    ) -> dict[str, Any]:
        found: dict[str, list[float]] = {name: [] for name in cases}
        plain_times: list[float] = []
        for number in range(rounds + 1):
            for name in cases if number % 2 else reversed(cases):
                # Plain vLLM right before or right after each case: what is compared shares its minute.
                if number % 2:
                    plain = await self.time_plain(load)
                    steered = await self.time_case(load, cases[name])
                else:
                    steered = await self.time_case(load, cases[name])
                    plain = await self.time_plain(load)
                if number:
                    found[name].append(plain / steered)
                    plain_times.append(plain)
                bar.update()
        produced = load.requests * (load.tokens if load.tokens > 1 else load.prompt_tokens)
        return {
            **{name: round(statistics.median(values), 3) for name, values in found.items()},
            "spread": {name: [round(min(v), 3), round(max(v), 3)] for name, v in found.items()},
            "plain_tokens_per_second": round(produced / statistics.median(plain_times), 1),
        }


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
    steer = await VllmEngine.start(settings)
    plain = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(options.model),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            dtype="float32",
            enforce_eager=not options.compiled,
        )
    )
    await steer.add_dictionary(NAME, stored)
    bench = Bench(plain, steer)
    rounds = 2 if options.quick else options.rounds
    loads = {
        name: (load._replace(tokens=min(load.tokens, 8)) if options.quick else load, asked)
        for name, (load, asked) in LOADS.items()
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
    await steer.shutdown()
    return result


if __name__ == "__main__":
    # vLLM starts its processes by importing this file again.
    options = parser(__doc__, rounds=7)
    add_engine_options(options)
    measure(options.parse_args(), main)
