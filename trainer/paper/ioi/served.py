"""The same patches through a steer-server's Patch RPC, where vLLM runs all sets of features as one batch."""

import asyncio
from collections.abc import Sequence

from steer_client import CallFailed, SteerClient
from steer_server.dictionary.files import StoredDictionary
from trainer.errors import BadConfig
from trainer.paper.ioi.patching import Effect
from trainer.paper.ioi.prompts import Prompt


def served_effects(
    address: str, stored: StoredDictionary, prompts: Sequence[Prompt], sets: Sequence[Sequence[int]]
) -> list[Effect]:
    """As `Patching.effects`, of a server that has the dictionary; BadConfig if it has another one."""
    try:
        return asyncio.run(_effects(address, stored, prompts, sets))
    except CallFailed as error:
        raise BadConfig(f"the server at {address}: {error}") from error


async def _effects(
    address: str, stored: StoredDictionary, prompts: Sequence[Prompt], sets: Sequence[Sequence[int]]
) -> list[Effect]:
    async with SteerClient(address) as client:
        name = await _resident(client, address, stored)
        answers = []
        for prompt in prompts:
            # The base is what runs, the counterfactual where activations come from.
            answers.append(
                await client.patch(list(prompt.counterfactual), list(prompt.tokens), name, sets)
            )
    return [
        Effect(
            sum(answer.results[number].reverse_source_kl for answer in answers) / len(answers),
            sum(
                answer.results[number].mean_edit_norm * len(prompt.tokens)
                for answer, prompt in zip(answers, prompts, strict=True)
            )
            / sum(len(prompt.tokens) for prompt in prompts),
        )
        for number in range(len(sets))
    ]


async def _resident(client: SteerClient, address: str, stored: StoredDictionary) -> str:
    """The dictionary's name on the server."""
    there = await client.dictionaries()
    for entry in there:
        if entry.sha256 == stored.sha256:
            return entry.name
    names = ", ".join(entry.name for entry in there) or "none"
    raise BadConfig(
        f"the server at {address} has no dictionary {stored.card.name!r} with sha256 {stored.sha256}; it has {names}"
    )
