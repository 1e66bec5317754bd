"""Metrics against what clients saw and what the fake engine computed."""

import urllib.request
import weakref

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY, Counter
from prometheus_client.parser import text_string_to_metric_families
from steer.v1 import activations_pb2, steering_pb2

from steer_client import ablate, add, read, read_top, rows
from steer_server.errors import EditNotApplied
from steer_server.generation import SlotLoad
from steer_server.metrics import BulkHistogram, Metrics
from tests.unit.serving import NAME, NEVER_FIRED, Serving, collect, serving, small_dictionary

WATCH = {NAME: (3, 5, NEVER_FIRED)}


def request(**fields) -> steering_pb2.GenerateStreamRequest:
    generation = steering_pb2.Generation(prompt={"text": "hello"}, **fields)
    return steering_pb2.GenerateStreamRequest(generation=generation)


def computed(service: Serving) -> torch.Tensor:
    """The activations of every row that the engine computed."""
    x = torch.cat([x for _, x in service.engine.computed])
    return small_dictionary().dictionary.encode(x)


async def test_watched_features_are_counted_over_all_rows_and_never_shown():
    async with serving(WATCH) as service:
        responses = await collect(service.steering.GenerateStream(request()))
        wanted = activations_pb2.EncodeRequest(prompt={"text": "hi"}, read_outs=[read_top(NAME, 1)])
        encoded = await collect(service.activations.Encode(wanted))

        f = computed(service)
        assert not any(response.tokens.activations for response in responses)
        assert [part.read_out for part in encoded[1].activations] == [0]
        for feature in WATCH[NAME]:
            labels = {"dictionary": NAME, "feature": str(feature)}
            active = f[:, feature][f[:, feature] != 0]
            count = service.metric("steer_feature_activation_count", **labels)
            assert count == len(active)
            total = service.metric("steer_feature_activation_sum", **labels)
            assert total == pytest.approx(float(active.sum()), rel=1e-5)
        assert (f[:, 3] != 0).any()


async def test_a_watched_feature_that_a_client_reads_too_is_counted_once():
    async with serving(WATCH) as service:
        read_outs = [read_top(NAME, 32), read(NAME, [5, 3])]
        responses = await collect(service.steering.GenerateStream(request(read_outs=read_outs)))

        parts = [part for response in responses for part in response.tokens.activations]
        seen = sum(
            feature == 3
            for part in parts
            if part.read_out == 1
            for row in rows(part)
            for feature, _ in row.features
        )
        assert {part.read_out for part in parts} == {0, 1}
        assert seen == int((computed(service)[:, 3] != 0).sum()) > 0
        assert service.metric("steer_feature_activation_count", feature="3") == seen


async def test_rows_that_the_prefix_cache_holds_are_not_counted():
    async with serving(WATCH) as service:
        service.engine.cached_tokens = 4
        await collect(service.steering.GenerateStream(request(sampling={"max_tokens": 1})))

        f = small_dictionary().dictionary.encode(service.engine.computed[0][1])[4:]
        assert service.metric("steer_feature_activation_count") == int(
            (f[:, WATCH[NAME]] != 0).sum()
        )


async def test_the_number_of_active_features_is_counted_once_per_row_and_dictionary():
    async with serving() as service:
        read_outs = [read_top(NAME, 1, only=["prompt"]), read_top(NAME, 2), read_top(NAME, 3)]
        await collect(service.steering.GenerateStream(request(read_outs=read_outs)))

        active = (computed(service) != 0).sum(dim=1)
        assert service.metric("steer_dictionary_active_features_count") == len(active)
        assert service.metric("steer_dictionary_active_features_sum") == int(active.sum())
        below = int((active <= 4).sum())
        assert service.metric("steer_dictionary_active_features_bucket", le="4.0") == below


async def test_tokens_and_requests_are_those_the_client_saw():
    async with serving() as service:
        plain = await collect(service.steering.GenerateStream(request()))
        await collect(
            service.steering.GenerateStream(
                request(edits=[add((NAME, 2), 1)], sampling={"max_tokens": 3})
            )
        )

        generated = sum(len(response.tokens.ids) for response in plain)
        tokens = "steer_tokens_total"
        assert service.metric(tokens, phase="generated", steered="0") == generated == 59
        assert service.metric(tokens, phase="prompt", steered="0") == 5
        assert service.metric(tokens, phase="generated", steered="1") == 3
        ended = {"rpc": "GenerateStream", "steered": "1", "finish_reason": "length"}
        assert service.metric("steer_requests_total", **ended) == 1
        for name in ("steer_request_seconds", "steer_time_to_first_token_seconds"):
            assert service.metric(f"{name}_count", steered="0") == 1
        assert service.metric("steer_encode_seconds_count", dictionary=NAME) == 59 + 3


async def test_edits_are_counted_as_reported():
    async with serving() as service:
        edits = [ablate((NAME, 2)), add((NAME, 3), 0.5, "norm")]
        responses = await collect(service.steering.GenerateStream(request(edits=edits)))

        ablated, added = responses[-1].finished.edit_reports
        counter = "steer_edit_tokens_total"
        assert service.metric(counter, dictionary=NAME, op="ablate") == ablated.tokens_changed
        assert service.metric(counter, dictionary=NAME, op="add") == added.tokens_changed > 0
        assert service.metric("steer_edit_relative_size_count") == 2
        assert service.metric("steer_edit_relative_size_sum") == pytest.approx(
            ablated.mean_relative_size + 0.5
        )


async def test_an_edit_that_did_not_run_is_counted():
    async with serving() as service:
        service.engine.failure = EditNotApplied("edit 0")
        with pytest.raises(Exception, match="edit 0"):
            await collect(service.steering.GenerateStream(request()))

        assert service.metric("steer_edit_not_applied_total") == 1
        assert service.metric("steer_requests_rejected_total", reason="NOT_APPLIED") == 1
        assert service.metric("steer_requests_total", finish_reason="error") == 1


async def test_full_slots_and_who_waits_for_them_can_be_scraped():
    async with serving() as service:
        service.engine.slot_load = SlotLoad({"resid_post.1": 7}, 16, 3)

        slots = {"site": "resid_post.1"}
        assert service.metric("steer_edit_slots", **slots, state="used") == 7
        assert service.metric("steer_edit_slots", **slots, state="all") == 16
        assert service.metric("steer_requests_waiting_for_slots") == 3


async def test_the_server_says_what_it_is():
    async with serving(WATCH) as service:
        assert service.metric("steer_engine_up") == 1
        service.engine.alive = False
        assert service.metric("steer_engine_up") == 0
        assert service.metric("steer_build_info", model="fake") == 1
        info = {"dictionary": NAME, "site": "resid_post.1", "architecture": "tied_relu"}
        assert service.metric("steer_dictionary_info", **info) == 1
        assert service.metric("steer_dictionary_features", dictionary=NAME) == 32
        assert service.metric("steer_feature_info", feature="3", label="names") == 1


def bucket_ends(metrics: Metrics, feature: int) -> list[float]:
    (family,) = metrics.feature_activation.collect()
    return [
        float(sample.labels["le"])
        for sample in family.samples
        if sample.name.endswith("_bucket") and sample.labels["feature"] == str(feature)
    ]


def test_buckets_follow_the_features_own_maximum():
    metrics = Metrics("fake", [(NAME, small_dictionary())], WATCH)

    assert bucket_ends(metrics, 3)[6:8] == [4.0, 6.0], "1 and 1.5 times its maximum"
    assert bucket_ends(metrics, NEVER_FIRED)[0] == 1 / 16


def test_a_bulk_histogram_counts_like_one_that_takes_single_values():
    histogram = BulkHistogram("h", "doc", ["name"])
    histogram.add_series(("a",), (1.0, 2.0))

    histogram.observe(("a",), np.array([0.5, 1.0, 1.5, 2.0, 9.0], np.float32))
    histogram.observe(("a",), np.array([], np.float32))

    (family,) = histogram.collect()
    values = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert values == {"1.0": 2, "2.0": 4, "+Inf": 5, "h_count": 5, "h_sum": 14.0}


def test_a_bulk_histogram_keeps_no_more_arrays_than_it_says():
    histogram = BulkHistogram("h", "doc", ["name"])
    histogram.add_series(("a",), (1.0, 2.0))
    arrays = [np.full(1 + i % 3, 1.5, np.float32) for i in range(2000)]
    kept = [weakref.ref(array) for array in arrays]
    n = sum(map(len, arrays))

    while arrays:
        histogram.observe(("a",), arrays.pop())
    alive = sum(array() is not None for array in kept)
    (family,) = histogram.collect()

    assert 0 < alive < 1500
    values = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert values == {"1.0": 0, "2.0": n, "+Inf": n, "h_count": n, "h_sum": 1.5 * n}


# What a Prometheus 2.42 sends; with it prometheus_client would answer in OpenMetrics, without colons.
_ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def test_a_scrape_has_our_metrics_and_those_of_the_default_registry():
    theirs = Counter("vllm:made_up", "As vLLM registers its own")
    server = Metrics("fake", [(NAME, small_dictionary())], WATCH).serve("127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        request = urllib.request.Request(url, headers={"Accept": _ACCEPT})
        with urllib.request.urlopen(request) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    finally:
        server.shutdown()
        server.server_close()
        REGISTRY.unregister(theirs)

    names = [family.name for family in families]
    assert {"steer_build_info", "vllm:made_up", "process_cpu_seconds"} <= set(names)
    assert len(names) == len(set(names)), "a family twice would break the scrape"
    ours = [family for family in families if family.name.startswith(("steer", "grpc"))]
    assert all(family.documentation for family in ours)
    assert not any(":" in family.name for family in ours)
