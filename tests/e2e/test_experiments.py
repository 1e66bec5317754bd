"""Compare, Score, Patch, chats and several sequences over gRPC, on the real engine, against transformers."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from steer.v1 import edits_pb2, steering_pb2

from steer_client import SteerClient, ablate, add
from steer_server.dictionary.edits import AddRelative, Clamp
from steer_server.dictionary.files import StoredDictionary
from tests.conftest import SITE
from tests.e2e.helpers import IOI
from tests.e2e.reference import Reference
from trainer.model import load_model, load_tokenizer
from trainer.paper.ioi.patching import Bench, Patching
from trainer.paper.ioi.prompts import draw, names
from trainer.paper.ioi.served import served_effects

pytestmark = pytest.mark.e2e

OTHER = IOI.replace("John gave", "Mary gave")
EDIT = add(("random", 9), 0.5, "norm", only=["generated"])


async def test_scores_equal_the_reference_under_edits(
    client: SteerClient, reference: Reference
) -> None:
    texts = [" Mary and the dog", " a book"]

    response = await client.score(IOI, texts, [EDIT])

    prompt = reference.tokenize(IOI)
    for scored, text in zip(response.continuations, texts, strict=True):
        forced = reference.tokenize(text)
        expected = reference.score(
            [*prompt, *forced], lambda p: (AddRelative(9, 0.5),) if p >= len(prompt) else ()
        )
        assert list(scored.tokens.ids) == forced
        assert scored.logprobs == pytest.approx(expected[-len(forced) :], abs=1e-4)
        assert [report.tokens_in_scope for report in scored.edit_reports] == [len(forced)]


async def test_patched_distributions_equal_the_reference(
    client: SteerClient, reference: Reference, random_dictionary: StoredDictionary
) -> None:
    source, target = reference.tokenize(OTHER), reference.tokenize(IOI)
    assert len(source) == len(target)
    mary, john = reference.tokenize(" Mary")[0], reference.tokenize(" John")[0]
    f, g = (
        random_dictionary.dictionary.encode(reference.generate(ids, 1, lambda p: ()).x)
        for ids in (source, target)
    )
    apart = (f - g)[1:].abs().amax(dim=0)
    some = apart.argsort(descending=True)[:20].tolist()

    response = await client.patch(
        OTHER, IOI, "random", [some, []], all_features=True, token_ids=[mary, john]
    )

    def patched(features: list[int]) -> torch.Tensor:
        def edits(position: int) -> tuple[Clamp, ...]:
            if position == 0:
                return ()
            return tuple(Clamp(i, float(f[position, i])) for i in features)

        return reference.next_token(target, edits)

    plain, other = (
        reference.next_token(target, lambda p: ()),
        reference.next_token(source, lambda p: ()),
    )
    whole, chosen, nothing = response.results
    for result, expected in (
        (whole, patched(list(response.differing_features))),
        (chosen, patched(some)),
        (nothing, plain),
    ):
        assert result.next.token_logprobs == pytest.approx(
            expected[[mary, john]].tolist(), abs=1e-3
        )
        assert result.source_kl == pytest.approx(kl(other, expected), abs=1e-3)
        assert result.target_kl == pytest.approx(kl(plain, expected), abs=1e-3)
        assert result.reverse_source_kl == pytest.approx(kl(expected, other), abs=1e-3)
    assert response.target_next.ids[0] == mary
    assert response.source_next.ids[0] == john
    assert len(response.differing_features) > 200
    assert chosen.edit_norm < whole.edit_norm


async def test_the_papers_experiment_through_the_server_is_the_one_offline(
    target: str, model_path: Path, random_dictionary: StoredDictionary
) -> None:
    tokenizer = load_tokenizer(str(model_path))
    prompts = draw(tokenizer, names(tokenizer, 10), 3, "0")
    bench = Bench(load_model(str(model_path)), SITE, prompts)
    patching = Patching(bench, random_dictionary.dictionary)
    order = patching.by_attribution(steps=1)
    sets = [[], order[:1], order[:40], order[-40:]]

    here = patching.effects(sets)
    there = await asyncio.to_thread(served_effects, target, random_dictionary, prompts, sets)

    for mine, theirs in zip(here, there, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-3)
    assert here[0].kl - here[2].kl > 0.01


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.double().exp() * (p.double() - q.double())).sum())


async def test_an_arm_parts_where_its_log_probabilities_say_so(client: SteerClient) -> None:
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    divergences = {}
    arms = [[add(("random", 9), 0.5, "norm")], [ablate(("random", 7))]]
    async for response in client.compare(IOI, arms, temperature=0, max_tokens=12):
        drawn[response.arm] += response.tokens.ids
        if response.WhichOneof("event") == "divergence":
            divergences[response.arm] = response.divergence

    assert sorted(divergences) == [1, 2]
    for arm, divergence in divergences.items():
        pairs = zip(drawn[0], drawn[arm], strict=False)
        parts = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        index = divergence.first_index if divergence.HasField("first_index") else None
        assert index == parts
        assert len(divergence.logprob_changes) == len(drawn[0])
    assert divergences[1].HasField("first_index")
    assert abs(divergences[1].mean_logprob_change) > 0.1
    scored = await client.score(IOI, [drawn[0]], arms[0])
    plain = await client.score(IOI, [drawn[0]])
    changes = np.subtract(scored.continuations[0].logprobs, plain.continuations[0].logprobs)
    assert divergences[1].logprob_changes == pytest.approx(changes, abs=1e-4)


async def test_a_chat_is_the_text_that_the_models_template_makes(
    client: SteerClient, reference: Reference
) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]

    answer = await client.complete(messages, temperature=0, max_tokens=12)

    assert list(answer.started.prompt.ids) == reference.chat(messages)
    assert "Paris" in answer.sequences[0].tokens.text


async def test_sequences_with_a_seed_are_those_of_single_calls(client: SteerClient) -> None:
    together = await client.complete("Once upon a time", n=3, seed=11, max_tokens=8, edits=[EDIT])
    alone = [
        await client.complete("Once upon a time", seed=11 + i, max_tokens=8, edits=[EDIT])
        for i in range(3)
    ]

    texts = [sequence.tokens.text for sequence in together.sequences]
    assert texts == [answer.sequences[0].tokens.text for answer in alone]
    assert len(set(texts)) == 3
    for sequence in together.sequences:
        assert sequence.finished.edit_reports[0].tokens_in_scope == 7


async def test_a_generation_stops_with_the_token_on_which_a_feature_fires(
    client: SteerClient, reference: Reference, random_dictionary: StoredDictionary
) -> None:
    prompt = reference.tokenize(IOI)
    plain = reference.generate(prompt, 16, lambda p: ())
    active = random_dictionary.dictionary.encode(plain.x)[len(prompt) :] > 0
    # One that sleeps for some tokens.
    first = active.float().argmax(dim=0).where(active.any(dim=0), 0)
    feature, kept = int(first.argmax()), int(first.max()) + 1
    stop = edits_pb2.Condition(dictionary="random", feature=feature)

    answer = await client.complete(
        IOI, temperature=0, max_tokens=16, ignore_eos=True, stop_when=[stop]
    )

    (sequence,) = answer.sequences
    assert 1 < kept < 16
    assert sequence.finished.reason == steering_pb2.FINISH_REASON_FEATURE
    assert tuple(sequence.tokens.ids) == plain.token_ids[:kept]
    assert sequence.finished.usage.generated_tokens == kept
