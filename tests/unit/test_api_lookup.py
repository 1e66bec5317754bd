"""Dictionaries, features and texts looked up over the wire, against direct computation."""

import asyncio
import functools
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from steer.v1 import activations_pb2, dictionaries_pb2, info_pb2, steering_pb2

from steer_client import CallFailed, read_top
from steer_server.admission import MAX_UPDATES
from steer_server.api.calls import MAX_REQUEST_BYTES
from steer_server.api.edits import MAX_EDITS
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import Evidence, Example
from steer_server.dictionary.files import StoredDictionary
from tests.unit.serving import D_MODEL, N_FEATURES, NAME, Serving, serving, small_dictionary

Code = grpc.StatusCode
INVALID, STATE = Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION
TEXTS = ("hello", "a", "the quick brown fox")
LABELS = {
    4: "Dogs",
    5: "hot dogs and other food",
    6: "dogs",
    7: "dogsled races",
    8: "food (hot)",
    9: "",
    10: "cats",
}


@functools.cache
def labelled() -> StoredDictionary:
    """The small dictionary, with labels; feature 9 has none, but tokens."""
    evidence = {
        feature: Evidence(feature, label, logits_up=((" Dogs", 1.0),) if feature == 9 else ())
        for feature, label in LABELS.items()
    }
    evidence[10] = Evidence(
        10, "cats", (Example(("big", " Dogs", "!"), (0.5, 3.0, 0.0)), Example(("a",), (0.0,)))
    )
    return replace(small_dictionary(), evidence=evidence)


@functools.cache
def wide() -> StoredDictionary:
    """Another d_model, and more features than a read-out has room for."""
    rows = torch.nn.functional.normalize(
        torch.randn(4200, D_MODEL + 1, generator=torch.Generator().manual_seed(3)), dim=1
    )
    return _of(Dictionary.tied(rows, torch.full((4200,), -0.1)))


@functools.cache
def dense() -> StoredDictionary:
    """Its 4,200 features are nearly all active on every token."""
    rows = torch.nn.functional.normalize(
        torch.randn(4200, D_MODEL, generator=torch.Generator().manual_seed(3)), dim=1
    )
    return _of(Dictionary.tied(rows, torch.full((4200,), 1000.0)))


def _of(dictionary: Dictionary) -> StoredDictionary:
    card = replace(
        small_dictionary().card, d_model=dictionary.d_model, n_features=dictionary.n_features
    )
    return replace(small_dictionary(), card=card, dictionary=dictionary, evidence={})


@pytest.fixture(scope="module")
async def running():
    more = {"labelled": labelled(), "wide": wide(), "dense": dense()}
    async with serving(more=more) as service:
        yield service


async def fails(call) -> CallFailed:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return CallFailed.from_rpc(caught.value)


async def matches(service: Serving, query: str, **fields) -> list[tuple[int, float]]:
    request = dictionaries_pb2.SearchFeaturesRequest(query=query, **fields)
    answer = await service.dictionaries.SearchFeatures(request)
    return [(match.index, round(match.score, 3)) for match in answer.matches]


async def test_one_dictionary_is_as_it_is_listed(running: Serving):
    listed = await running.dictionaries.ListDictionaries(dictionaries_pb2.ListDictionariesRequest())
    wanted = dictionaries_pb2.GetDictionaryRequest(dictionary="wide")
    one = (await running.dictionaries.GetDictionary(wanted)).dictionary

    assert [entry.name for entry in listed.dictionaries] == ["dense", "labelled", NAME, "wide"]
    assert one == listed.dictionaries[3]


async def test_a_dictionary_that_keeps_the_k_largest_says_k():
    top = replace(small_dictionary(), card=replace(small_dictionary().card, k=5))
    async with serving(more={"top": top}) as service:
        wanted = dictionaries_pb2.GetDictionaryRequest(dictionary="top")
        answer = await service.dictionaries.GetDictionary(wanted)

    assert answer.dictionary.k == 5


async def test_features_come_in_the_order_asked_for(running: Serving):
    wanted = dictionaries_pb2.BatchGetFeaturesRequest(dictionary=NAME, features=[7, 3, 0])
    answer = await running.dictionaries.BatchGetFeatures(wanted)

    assert [feature.index for feature in answer.features] == [7, 3, 0]
    assert [feature.label for feature in answer.features] == ["", "names", ""]
    one = dictionaries_pb2.GetFeatureRequest(dictionary=NAME, feature=3)
    assert (await running.dictionaries.GetFeature(one)).feature == answer.features[1]


async def test_a_search_ranks_the_label_itself_then_whole_words_then_parts(running: Serving):
    found = await matches(running, " DOGS ")

    assert [index for index, _ in found] == [4, 6, 5, 7]
    assert found[0][1] == found[1][1] == 1.0
    assert 0.6 < found[2][1] < 0.9
    assert 0.3 < found[3][1] < 0.6


async def test_a_search_wants_every_word_in_any_order(running: Serving):
    assert [index for index, _ in await matches(running, "food hot")] == [8, 5]
    assert [index for index, _ in await matches(running, "ot ogs")] == [5]
    assert await matches(running, "dogs cats") == []


async def test_a_search_in_the_evidence_finds_tokens_after_labels(running: Serving):
    found = await matches(running, "dogs", search_in=dictionaries_pb2.SEARCH_IN_EVIDENCE)

    assert [index for index, _ in found] == [4, 6, 5, 7, 9, 10]
    assert [score for _, score in found[4:]] == [0.2, 0.2]
    assert await matches(running, "big", search_in=dictionaries_pb2.SEARCH_IN_EVIDENCE) == []


async def test_pages_put_together_are_the_whole_search(running: Serving):
    request = dictionaries_pb2.SearchFeaturesRequest(query="dogs", page_size=3)
    seen, pages = [], 0
    while True:
        answer = await running.dictionaries.SearchFeatures(request)
        seen += [(match.dictionary, match.index) for match in answer.matches]
        pages += 1
        request.page_token = answer.next_page_token
        if not answer.next_page_token:
            break

    assert (pages, answer.total) == (2, 4)
    assert seen == [("labelled", index) for index in (4, 6, 5, 7)]


async def test_a_page_token_of_another_search_is_refused(running: Serving):
    request = dictionaries_pb2.SearchFeaturesRequest(query="dogs", page_size=1)
    token = (await running.dictionaries.SearchFeatures(request)).next_page_token

    for fields in (
        {"query": "food", "page_token": token},
        {"query": "dogs", "page_token": token, "dictionary": "labelled"},
        {"query": "dogs", "page_token": token, "search_in": dictionaries_pb2.SEARCH_IN_EVIDENCE},
        {"query": "dogs", "page_token": "x"},
        {"query": "dogs", "page_token": "ü" + token[1:]},
    ):
        wanted = dictionaries_pb2.SearchFeaturesRequest(**fields)
        error = await fails(running.dictionaries.SearchFeatures(wanted))
        assert (error.code, error.field) == (INVALID, "page_token")


def cosines(feature: int) -> np.ndarray:
    rows = small_dictionary().dictionary.W_dec.double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    return rows @ rows[feature] / norms / norms[feature]


async def test_the_nearest_features_have_the_largest_cosines(running: Serving):
    wanted = dictionaries_pb2.NearestFeaturesRequest(dictionary=NAME, feature=3, top_k=5)
    answer = await running.dictionaries.NearestFeatures(wanted)

    expected = [int(index) for index in np.argsort(-cosines(3)) if index != 3][:5]
    assert [match.index for match in answer.matches] == expected
    got = [match.score for match in answer.matches]
    assert got == pytest.approx(cosines(3)[expected], abs=1e-6)


async def test_the_nearest_of_another_dictionary_include_the_same_row(running: Serving):
    wanted = dictionaries_pb2.NearestFeaturesRequest(
        dictionary=NAME, feature=4, among="labelled", top_k=128
    )
    answer = await running.dictionaries.NearestFeatures(wanted)

    assert len(answer.matches) == N_FEATURES
    first = answer.matches[0]
    assert (first.dictionary, first.index, first.label) == ("labelled", 4, "Dogs")
    assert first.score == pytest.approx(1.0)


async def test_ten_are_the_nearest_unless_more_are_asked_for(running: Serving):
    wanted = dictionaries_pb2.NearestFeaturesRequest(dictionary=NAME, feature=3)

    assert len((await running.dictionaries.NearestFeatures(wanted)).matches) == 10


def prompts(*texts: str) -> list[dict]:
    return [{"text": text} for text in texts]


def encoded(service: Serving, texts, first: int = 1) -> np.ndarray:
    """The activations of the counted tokens, encoded directly; tokens are characters."""
    embedding = service.engine._embedding
    x = torch.cat([embedding[[ord(c) for c in text]][first:] for text in texts])
    return small_dictionary().dictionary.encode(x).double().numpy()


AGGREGATES = {
    activations_pb2.AGGREGATE_UNSPECIFIED: lambda f: f.mean(axis=0),
    activations_pb2.AGGREGATE_MEAN: lambda f: f.mean(axis=0),
    activations_pb2.AGGREGATE_MAX: lambda f: f.max(axis=0),
    activations_pb2.AGGREGATE_SUM: lambda f: f.sum(axis=0),
    activations_pb2.AGGREGATE_FREQUENCY: lambda f: (f != 0).mean(axis=0),
}


@pytest.mark.parametrize("include_first", [False, True])
@pytest.mark.parametrize("aggregate", AGGREGATES)
async def test_inspect_ranks_features_as_direct_encoding_does(
    running: Serving, aggregate: int, include_first: bool
):
    request = activations_pb2.InspectRequest(
        prompts=prompts(*TEXTS),
        dictionary=NAME,
        aggregate=aggregate,
        top_k=7,
        include_first=include_first,
    )
    answer = await running.activations.Inspect(request)

    f = encoded(running, TEXTS, first=0 if include_first else 1)
    order = np.argsort(-AGGREGATES[aggregate](f), kind="stable")[:7].tolist()
    assert [entry.feature for entry in answer.features] == order
    assert answer.tokens == len(f)
    for entry in answer.features:
        column = f[:, entry.feature]
        got = entry.mean, entry.max, entry.sum, entry.frequency
        want = column.mean(), column.max(), column.sum(), (column != 0).mean()
        assert got == pytest.approx(want, rel=1e-5)


async def test_inspect_leaves_out_what_is_active_nowhere_and_labels_the_rest(running: Serving):
    request = activations_pb2.InspectRequest(
        prompts=prompts("ab"), dictionary="labelled", top_k=1024
    )
    answer = await running.activations.Inspect(request)

    active = (encoded(running, ["ab"]) != 0).any(axis=0)
    assert {entry.feature for entry in answer.features} == set(np.flatnonzero(active).tolist())
    assert {entry.feature: entry.label for entry in answer.features} == {
        int(feature): LABELS.get(int(feature), "") for feature in np.flatnonzero(active)
    }


@pytest.mark.parametrize(
    "aggregate", [activations_pb2.AGGREGATE_MEAN, activations_pb2.AGGREGATE_FREQUENCY]
)
async def test_contrast_parts_the_features_by_the_side_that_has_more(
    running: Serving, aggregate: int
):
    request = activations_pb2.ContrastRequest(
        positive=prompts("hello", "world"),
        negative=prompts("quiet"),
        dictionary=NAME,
        aggregate=aggregate,
        top_k=1024,
    )
    answer = await running.activations.Contrast(request)

    sides = [
        AGGREGATES[aggregate](encoded(running, texts)) for texts in (["hello", "world"], ["quiet"])
    ]
    difference = sides[0] - sides[1]
    assert (answer.positive_tokens, answer.negative_tokens) == (8, 4)
    for found, sign in ((answer.positive, 1), (answer.negative, -1)):
        features = [entry.feature for entry in found]
        assert set(features) == set(np.flatnonzero(sign * difference > 0).tolist())
        assert [entry.difference for entry in found] == pytest.approx(difference[features])
        assert (np.diff([sign * entry.difference for entry in found]) <= 0).all()
        assert [entry.positive for entry in found] == pytest.approx(sides[0][features])
        assert [entry.negative for entry in found] == pytest.approx(sides[1][features])


async def test_the_texts_of_a_call_are_in_the_engine_together():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(0)
        request = activations_pb2.InspectRequest(prompts=prompts(*"abcd"), dictionary=NAME)
        request.include_first = True
        call = service.activations.Inspect(request)
        async with asyncio.timeout(5):
            while len(service.engine.running) < 4:
                await asyncio.sleep(0.005)
        for _ in range(4):
            service.engine.steps.release()

        assert (await call).tokens == 4
        assert service.metric("steer_requests_total", rpc="Inspect") == 4


async def test_a_text_whose_active_features_do_not_fit_fails_instead_of_being_cut(
    running: Serving,
):
    request = activations_pb2.InspectRequest(prompts=prompts("ab"), dictionary="dense")

    error = await fails(running.activations.Inspect(request))

    assert (error.code, error.field) == (STATE, "dictionary")
    assert "4200 features are active on the token at position 1" in str(error)


async def test_a_dictionary_with_negative_activations_is_refused_instead_of_half_read():
    directions = _of(Dictionary.directions(torch.eye(D_MODEL)))
    async with serving(more={"axes": directions}) as service:
        inspect = activations_pb2.InspectRequest(prompts=prompts("ab"), dictionary="axes")
        contrast = activations_pb2.ContrastRequest(
            positive=prompts("ab"), negative=prompts("cd"), dictionary="axes"
        )
        for call in (
            service.activations.Inspect(inspect),
            service.activations.Contrast(contrast),
        ):
            error = await fails(call)
            assert (error.code, error.field) == (STATE, "dictionary")
            assert "may be negative" in str(error)


async def test_a_failure_in_one_text_ends_the_others():
    async with serving(more={"dense": dense()}) as service:
        service.engine.steps = asyncio.Semaphore(1)
        request = activations_pb2.ContrastRequest(
            positive=prompts("ab"), negative=prompts("cd"), dictionary="dense"
        )

        error = await fails(service.activations.Contrast(request))

        assert error.code is STATE
        assert service.engine.running == {}
        assert service.engine.finished == []


def generation(**fields) -> steering_pb2.GenerateStreamRequest:
    message = steering_pb2.Generation(prompt={"text": "hello"}, **fields)
    return steering_pb2.GenerateStreamRequest(generation=message)


async def test_watch_stats_count_all_requests_since_the_response_before():
    async with serving({NAME: (5, 3)}) as service:
        await _drained(service.steering.GenerateStream(generation()))
        before = len(service.engine.computed)
        request = activations_pb2.WatchStatsRequest(interval_seconds=0.1)
        began = time.monotonic()
        call = service.activations.WatchStats(request)
        first = await call.read()
        await asyncio.gather(
            _drained(service.steering.GenerateStream(generation())),
            _drained(service.steering.GenerateStream(generation(read_outs=[read_top(NAME, 2)]))),
        )
        elapsed, found = time.monotonic() - began, []
        while sum(response.seconds for response in found) < elapsed:
            found.append(await call.read())
        call.cancel()

    assert [(entry.feature, entry.label) for entry in first.features] == [(3, "names"), (5, "")]
    assert [entry.active_tokens for entry in first.features] == [0, 0]
    assert first.seconds == 0
    x = torch.cat([x for _, x in service.engine.computed[before:]])
    f = small_dictionary().dictionary.encode(x).double().numpy()
    for place, feature in enumerate((3, 5)):
        entries = [response.features[place] for response in found]
        values = f[:, feature][f[:, feature] != 0]
        assert sum(entry.active_tokens for entry in entries) == len(values) > 0
        assert sum(entry.sum for entry in entries) == pytest.approx(values.sum(), rel=1e-6)
        assert max(entry.max for entry in entries) == pytest.approx(values.max(), rel=1e-6)
    assert all(response.seconds >= 0.09 for response in found)


async def test_draining_ends_watch_stats_at_once():
    async with serving({NAME: (3,)}) as service:
        call = service.activations.WatchStats(
            activations_pb2.WatchStatsRequest(interval_seconds=3600)
        )
        await call.read()
        await asyncio.wait_for(service.server.drain(10), 5)

        error = await fails(call.read())

    assert error.code is Code.UNAVAILABLE


async def _drained(call) -> list:
    return [response async for response in call]


async def test_the_server_says_what_it_is_and_can_do():
    async with serving() as service:
        answer = await service.info.GetServerInfo(info_pb2.GetServerInfoRequest())
        await service.engine.self_test()
        later = await service.info.GetServerInfo(info_pb2.GetServerInfoRequest())

    assert (answer.model, answer.d_model, answer.vocab_size) == ("fake", D_MODEL, 128)
    assert answer.version
    assert answer.vllm_version
    assert [(entry.site, entry.slots) for entry in answer.sites] == [("resid_post.1", 16)]
    assert [entry.name for entry in answer.dictionaries] == [NAME]
    assert list(answer.edit_kinds) == ["ablate", "clamp", "scale", "add", "limit", "patch"]
    assert (answer.limits.max_model_len, answer.limits.max_num_seqs) == (64, 8)
    assert (answer.limits.edits, answer.limits.updates) == (MAX_EDITS, MAX_UPDATES)
    assert (answer.self_test_passed, later.self_test_passed) == (False, True)
    assert 0 <= answer.uptime_seconds < later.uptime_seconds < 60


async def test_a_request_larger_than_the_limit_that_is_told_is_refused():
    async with serving() as service:
        limit = (await service.info.GetServerInfo(info_pb2.GetServerInfoRequest())).limits
        too_large = dictionaries_pb2.GetDictionaryRequest(dictionary="x" * limit.request_bytes)

        error = await fails(service.dictionaries.GetDictionary(too_large))

    assert limit.request_bytes == MAX_REQUEST_BYTES
    assert error.code is Code.RESOURCE_EXHAUSTED
