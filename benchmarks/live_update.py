"""How late a live update holds, and what updates cost the other requests of the batch.

A client that has seen t tokens of a generation sends new edits; they hold from token t + k on, counted from 0. k is how
many tokens late: 0 would be the very next token, but that one is already being computed, so 1 is the least there is
without stopping the engine. The updates are sent at random moments while eight other requests run.

The inter-token latency of the eight is measured with updates and without in turns, round by round; the ratio is the
median over rounds of (median latency with / median latency without).

    python benchmarks/live_update.py --json build/live_update.json

`--quick` takes two short rounds, to see that it runs. `--compiled` leaves torch.compile on (needs a C++ compiler).
"""

import argparse
import asyncio
import random
import statistics
import time
from typing import Any

from common import add_engine_options, circumstances, measure, parser
from tqdm import tqdm

from steer_server.dictionary import files
from steer_server.dictionary.edits import AddRelative
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.generation import Generation, Sampling
from steer_server.program import FeatureEdit, Program

OTHERS, PROMPT_TOKENS, MAX_MODEL_LEN = 8, 16, 1024
NAME = "d"


def program(feature: int) -> Program:
    return Program((FeatureEdit(NAME, AddRelative(feature, 0.01)),))


class Bench:
    """One engine; the counter keeps request ids and prompts new, so that no prefix is cached."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._count = 0
        self._random = random.Random(0)

    async def round(self, tokens: int, updates: int, sent: bool) -> tuple[list[int], list[float]]:
        """(tokens late of each update, seconds between tokens of the other requests).

        Without `sent` the client waits for the same moments and lets them pass: how often it wakes up matters on a
        machine with as many cores as the model has threads.
        """
        gaps: list[list[float]] = [[] for _ in range(OTHERS)]
        others = [asyncio.create_task(self._other(tokens, found)) for found in gaps]
        late = await self._live(tokens, updates, sent)
        await asyncio.gather(*others)
        return late, [gap for found in gaps for gap in found]

    async def _other(self, tokens: int, gaps: list[float]) -> None:
        last = None
        async for _ in self._engine.generate(self._generation(tokens, program(0), False)):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now

    async def _live(self, tokens: int, updates: int, sent: bool) -> list[int]:
        generation = self._generation(tokens, program(1), True)
        seen, sent_at, applied = 0, {}, []
        sender = None

        async def send() -> None:
            for number in range(updates):
                # Somewhere in the equal share of the time that is this update's.
                share = tokens * 0.8 / updates
                until = int((number + self._random.random()) * share) + 2
                while seen < until:
                    await asyncio.sleep(self._random.uniform(0.002, 0.02))
                if not sent:
                    continue
                at = seen
                sent_at[await self._engine.update(generation.request_id, program(number + 2))] = at

        async for step in self._engine.generate(generation):
            seen += len(step.token_ids)
            if sender is None:
                sender = asyncio.create_task(send())
            applied += step.applied
        if sender is not None:
            await sender
        if len(applied) != len(sent_at):
            raise RuntimeError(f"{len(sent_at)} updates were sent, {len(applied)} were applied")
        return [entry.first_index - sent_at[entry.revision] for entry in applied]

    def _generation(self, tokens: int, program: Program, live: bool) -> Generation:
        self._count += 1
        prompt = tuple(1000 + (self._count * 7919 + i * 31) % 40000 for i in range(PROMPT_TOKENS))
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return Generation(f"r{self._count}", prompt, sampling, program, live)


async def measured(bench: Bench, rounds: int, tokens: int, updates: int) -> dict[str, Any]:
    late: list[int] = []
    latency: dict[bool, list[float]] = {True: [], False: []}
    await bench.round(8, 1, sent=False)
    for number in tqdm(range(rounds), unit="pair"):
        for updating in (True, False) if number % 2 else (False, True):
            found, gaps = await bench.round(tokens, updates, updating)
            late += found
            latency[updating].append(statistics.median(gaps))
    ratios = [a / b for a, b in zip(latency[True], latency[False], strict=True)]
    late.sort()
    return {
        "updates": len(late),
        "tokens_late": {
            "median": statistics.median(late),
            "p95": late[min(len(late) - 1, int(0.95 * len(late)))],
            "max": late[-1],
        },
        "others": OTHERS,
        "others_itl_ms": {
            "with_updates": round(1e3 * statistics.median(latency[True]), 2),
            "without": round(1e3 * statistics.median(latency[False]), 2),
        },
        "others_itl_ratio": round(statistics.median(ratios), 3),
        "others_itl_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }


async def main(options: argparse.Namespace) -> dict[str, Any]:
    stored = files.load(options.dictionary)
    settings = EngineSettings(
        str(options.model),
        (stored.card.site,),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=OTHERS + 1,
        dtype="float32",
        enforce_eager=not options.compiled,
        kv_cache_gib=1,
    )
    engine = await VllmEngine.start(settings)
    await engine.add_dictionary(NAME, stored)
    rounds, tokens, updates = (2, 24, 4) if options.quick else (options.rounds, 128, 20)
    result = {
        **circumstances(options),
        "n_features": stored.card.n_features,
        "compiled": options.compiled,
        "async_scheduling": engine._llm.vllm_config.scheduler_config.async_scheduling,
        "rounds": rounds,
        **await measured(Bench(engine), rounds, tokens, updates),
    }
    await engine.shutdown()
    return result


if __name__ == "__main__":
    # vLLM starts its processes by importing this file again.
    options = parser(__doc__, rounds=9)
    add_engine_options(options)
    measure(options.parse_args(), main)
