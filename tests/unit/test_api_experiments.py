"""Compare, Score and Patch over the wire, against what the engine's own map gives."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from steer_client import CallFailed, SteerClient, add
from steer_server.api import patching
from steer_server.generation import SlotLoad
from tests.unit.serving import INPUT_SCALE, NAME, Serving, serving, small_dictionary

SOURCE, TARGET = "hello", "hulks"
SLOTS = 31
STEERED = [add((NAME, 2), 3, "norm")]


@pytest.fixture(scope="module")
async def running():
    async with serving() as service, SteerClient(service.target) as client:
        service.engine.slot_load = SlotLoad({"resid_post.1": 0}, SLOTS, 0)
        yield service, client


def logprobs(service: Serving, text: str) -> torch.Tensor:
    """Of the plain model, after each token."""
    x = service.engine._embedding[[ord(character) for character in text]]
    return (x @ service.engine._head).log_softmax(1)


async def test_a_score_is_the_log_probability_of_each_forced_token(running):
    service, client = running

    response = await client.score("he", ["llo", "l"])

    expected = logprobs(service, "hello")
    for scored, text in zip(response.continuations, ["llo", "l"], strict=True):
        wanted = [float(expected[1 + i, ord(character)]) for i, character in enumerate(text)]
        assert scored.logprobs == pytest.approx(wanted, abs=1e-5)
        assert scored.logprob == pytest.approx(sum(wanted), abs=1e-5)
        assert list(scored.tokens.pieces) == list(text)


async def test_a_scores_continuation_counts_as_generated(running):
    _, client = running
    edit = add((NAME, 2), 3, "norm", only=["generated"])

    response = await client.score("he", ["llo"], [edit])
    plain = await client.score("he", ["llo"])

    (scored,), (before,) = response.continuations, plain.continuations
    assert [report.tokens_in_scope for report in scored.edit_reports] == [3]
    assert scored.logprobs[0] == before.logprobs[0], "its first token is drawn from the prompt"
    assert scored.logprobs[1] != before.logprobs[1]


async def test_a_comparison_says_where_arms_part_and_by_how_much(running):
    _, client = running
    found: dict[int, list] = {}
    async for response in client.compare("hello", [STEERED, []], max_tokens=6):
        found.setdefault(response.arm, []).append(response)

    events = {
        arm: [response.WhichOneof("event") for response in responses]
        for arm, responses in found.items()
    }
    assert [events[arm][0] for arm in (0, 1, 2)] == ["started"] * 3
    assert [events[arm][-1] for arm in (0, 1, 2)] == ["finished", "divergence", "divergence"]
    drawn = {arm: [t for r in responses for t in r.tokens.ids] for arm, responses in found.items()}
    seeds = {responses[0].started.sampling.seed for responses in found.values()}
    assert len(seeds) == 1
    steered, same = found[1][-1].divergence, found[2][-1].divergence
    assert drawn[2] == drawn[0]
    assert not same.HasField("first_index")
    assert set(same.logprob_changes) == {0.0}
    parts = next(i for i, (a, b) in enumerate(zip(drawn[0], drawn[1], strict=True)) if a != b)
    assert steered.first_index == parts
    scores = await client.score("hello", [drawn[0]], STEERED)
    plain = await client.score("hello", [drawn[0]])
    changes = np.subtract(scores.continuations[0].logprobs, plain.continuations[0].logprobs)
    assert steered.logprob_changes == pytest.approx(changes, abs=1e-5)
    assert steered.mean_logprob_change == pytest.approx(changes.mean(), abs=1e-5)


async def test_a_comparison_that_ends_early_scores_the_edits_that_hold_in_what_was_drawn(running):
    service, client = running
    late = add((NAME, 2), 3, "norm", windows=[(len("hello") + 4, None)])
    service.engine.ends_after = 2

    try:
        found = [response async for response in client.compare("hello", [[late]], max_tokens=8)]
    finally:
        service.engine.ends_after = 0

    assert list(found[-1].divergence.logprob_changes) == [0.0, 0.0]


@pytest.mark.parametrize("rpc", ["compare", "patch"])
async def test_a_comparison_or_a_patch_keeps_its_dictionary_to_its_end(rpc: str):
    async with serving() as service, SteerClient(service.target) as client:
        service.engine.steps = asyncio.Semaphore(0)
        call = asyncio.ensure_future(
            _all(client.compare("hello", [STEERED], max_tokens=2))
            if rpc == "compare"
            else client.patch(SOURCE, TARGET, NAME, [[1, 2, 3]])
        )
        await _until(lambda: len(service.engine.running) == 2)
        leaving = asyncio.ensure_future(client.admin.unload(NAME, wait=True))
        await _until(lambda: NAME not in service.generations.registry)
        while not call.done():
            # The client learns of an end later than the server lets the dictionary go.
            in_use = service.generations.uses.count(NAME) > 0
            assert NAME in service.engine._dictionaries or not in_use
            service.engine.steps.release()
            await asyncio.sleep(0.005)
        await asyncio.wait_for(leaving, 5)

    if rpc == "compare":
        assert call.result()[-1].divergence.logprob_changes[1] != 0
    else:
        assert call.result().results[0].patched_features == 3


async def _all(responses) -> list:
    return [response async for response in responses]


async def _until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def activations(service: Serving, text: str) -> torch.Tensor:
    x = service.engine._embedding[[ord(character) for character in text]]
    return small_dictionary().dictionary.encode(x)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double(), q.double()
    return float((p.exp() * (p - q)).sum())


async def test_patching_a_set_gives_the_distribution_of_the_patched_target(running):
    service, client = running
    f_source, f_target = activations(service, SOURCE), activations(service, TARGET)
    differing = (f_source[1:] != f_target[1:]).any(dim=0).nonzero()[:, 0].tolist()
    chosen = differing[:3]

    response = await client.patch(SOURCE, TARGET, NAME, [chosen, []], token_ids=[7], top_k=5)

    assert sorted(response.differing_features) == differing
    largest = (f_source[1:] - f_target[1:]).abs().amax(dim=0)
    first = response.differing_features[0]
    assert largest[first] == max(largest[feature] for feature in response.differing_features)
    plain, other = logprobs(service, TARGET)[-1], logprobs(service, SOURCE)[-1]
    change = (f_source - f_target)[:, chosen] @ small_dictionary().dictionary.W_dec[chosen]
    change[0] = 0
    x = service.engine._embedding[ord(TARGET[-1])] + change[-1] / INPUT_SCALE
    patched = (x @ service.engine._head).log_softmax(0)
    result, nothing = response.results
    assert result.next.token_logprobs == pytest.approx([float(patched[7])], abs=1e-4)
    assert list(result.next.ids) == patched.argsort(descending=True)[:5].tolist()
    assert result.source_kl == pytest.approx(kl(other, patched), abs=1e-4)
    assert result.target_kl == pytest.approx(kl(plain, patched), abs=1e-4)
    assert result.edit_norm == pytest.approx(float((change / INPUT_SCALE).norm()), rel=1e-4)
    lengths = (change / INPUT_SCALE).norm(dim=1)
    assert result.mean_edit_norm == pytest.approx(float(lengths.mean()), rel=1e-4)
    assert result.reverse_source_kl == pytest.approx(kl(patched, other), abs=1e-4)
    assert result.patched_features == len(chosen)
    assert (nothing.target_kl, nothing.edit_norm, nothing.patched_features) == (0, 0, 0)
    assert response.source_target_kl == pytest.approx(kl(other, plain), abs=1e-4)


async def test_what_patches_made_of_it_is_compared_beside_the_event_loop(
    running, monkeypatch: pytest.MonkeyPatch
):
    compare, calls = patching.kl, []

    def measured(p, q) -> float:
        calls.append(threading.current_thread() is threading.main_thread())
        return compare(p, q)

    monkeypatch.setattr(patching, "kl", measured)
    await running[1].patch(SOURCE, TARGET, NAME, [[feature] for feature in range(8)])

    # The one of source and target is made once.
    assert sorted(calls) == [False] * 24 + [True]


async def test_all_features_are_those_that_differ(running):
    service, client = running
    f_source, f_target = activations(service, "hel"), activations(service, "hal")

    response = await client.patch("hel", "hal", NAME, all_features=True)

    differing = (f_source[1] != f_target[1]).nonzero()[:, 0].tolist()
    assert sorted(response.differing_features) == differing
    assert response.results[0].patched_features == len(differing)


async def test_more_features_than_slots_are_refused(running):
    with pytest.raises(CallFailed, match=f"would patch 32 features; at most {SLOTS}"):
        await running[1].patch(SOURCE, TARGET, NAME, all_features=True)


async def test_positions_pair_a_target_with_another_place_of_the_source(running):
    service, client = running
    f_source, f_target = activations(service, "hi"), activations(service, TARGET)

    response = await client.patch("hi", TARGET, NAME, all_features=True, positions={-1: 1})

    differing = (f_source[1] != f_target[-1]).nonzero()[:, 0].tolist()
    assert sorted(response.differing_features) == differing
