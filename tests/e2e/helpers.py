"""Runs generations on an engine and gathers what came out."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from steer_server.dictionary.edits import Edit
from steer_server.generation import (
    ActivationRows,
    Engine,
    Finish,
    Generation,
    RevisionApplied,
    Sampling,
)
from steer_server.program import FeatureEdit, Program, ReadOut

IOI = "When Mary and John went to the store, John gave a drink to"
TEXTS = (IOI, "The capital of France is", "My favourite animal is the", "Once upon a time")


@dataclass
class Outcome:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    rows: list[ActivationRows] = field(default_factory=list)
    applied: list[RevisionApplied] = field(default_factory=list)
    finish: Finish | None = None

    def features(self) -> dict[int, dict[int, float]]:
        """position -> feature -> activation; a position read twice is an error."""
        table: dict[int, dict[int, float]] = {}
        for rows in self.rows:
            for i, position in enumerate(rows.positions.tolist()):
                assert position not in table, f"position {position} was reported twice"
                part = slice(rows.row_splits[i], rows.row_splits[i + 1])
                table[position] = dict(
                    zip(rows.features[part].tolist(), rows.values[part].tolist(), strict=True)
                )
        return table


def program(edits: Sequence[Edit] = (), *read_outs: ReadOut, name: str = "random") -> Program:
    return Program(tuple(FeatureEdit(name, edit) for edit in edits), tuple(read_outs))


async def tokens_of(outcome: Outcome, count: int) -> None:
    """Waits until so many have come."""
    while len(outcome.token_ids) < count:
        await asyncio.sleep(0.005)


async def run(
    engine: Engine,
    name: str,
    prompt: Sequence[int],
    program: Program = Program(),  # noqa: B008 - frozen
    tokens: int = 16,
    live: bool = False,
    seed: int | None = None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Greedy, or with `seed` not; `outcome` is filled as the tokens come."""
    temperature = 0.0 if seed is None else 1.0
    sampling = Sampling(tokens, temperature, seed=seed, ignore_eos=True, logprobs=True)
    outcome = outcome or Outcome()
    async for step in engine.generate(Generation(name, tuple(prompt), sampling, program, live)):
        assert step.first_index == len(outcome.token_ids)
        outcome.token_ids += step.token_ids
        outcome.logprobs += step.logprobs
        outcome.text += step.text
        outcome.rows += step.activations
        outcome.applied += step.applied
        outcome.finish = step.finish
    assert outcome.finish is not None
    return outcome
