"""What Prometheus counts is what the client saw, each number on its own."""

import pytest

from tests.prometheus.processes import Addresses, Prometheus
from tests.prometheus.traffic import NAME, WATCHED, Seen

pytestmark = [pytest.mark.prometheus, pytest.mark.timeout(900)]


def test_every_watched_feature_has_as_many_activations_as_the_client_read(
    prometheus: Prometheus, seen: Seen
) -> None:
    counts = {
        int(labels["feature"]): value
        for labels, value in prometheus.query(
            f'steer_feature_activation_count{{dictionary="{NAME}"}}'
        )
    }

    assert counts == {feature: seen.nonzero[feature] for feature in WATCHED}
    assert len(set(counts.values())) > 2, "too uniform to prove anything"


def test_sums_and_buckets_of_activations_agree_with_what_the_client_read(
    prometheus: Prometheus, seen: Seen
) -> None:
    sums = {
        int(labels["feature"]): value
        for labels, value in prometheus.query("steer_feature_activation_sum")
    }
    last = prometheus.query('steer_feature_activation_bucket{le="+Inf"}')

    assert sums == pytest.approx({feature: seen.total[feature] for feature in WATCHED}, rel=1e-4)
    assert {int(labels["feature"]): value for labels, value in last} == {
        feature: seen.nonzero[feature] for feature in WATCHED
    }


def test_the_firing_rate_is_a_share_of_the_rows_the_client_read(
    prometheus: Prometheus, seen: Seen
) -> None:
    rows = prometheus.value(
        'sum(steer_tokens_total) - sum(steer_requests_total{finish_reason=~"stop|length"})'
        " - sum(vllm:prompt_tokens_cached_total)"
    )

    assert rows == seen.rows


def test_tokens_are_counted_by_phase_and_by_whether_an_edit_held(
    prometheus: Prometheus, seen: Seen
) -> None:
    found = {
        (labels["phase"], labels["steered"]): value
        for labels, value in prometheus.query("steer_tokens_total")
    }

    assert found == seen.tokens
    assert len(found) == 4


def test_requests_are_counted_by_rpc_steered_and_reason(prometheus: Prometheus, seen: Seen) -> None:
    found = {
        (labels["rpc"], labels["steered"], labels["finish_reason"]): value
        for labels, value in prometheus.query("steer_requests_total")
    }

    assert found == seen.requests
    for name in ("steer_request_seconds_count", "steer_time_to_first_token_seconds_count"):
        for steered in "01":
            of_client = sum(n for (_, held, _), n in seen.requests.items() if held == steered)
            assert prometheus.value(f'{name}{{steered="{steered}"}}') == of_client, name


def test_tokens_that_edits_changed_are_those_of_the_reports_to_the_client(
    prometheus: Prometheus, seen: Seen
) -> None:
    found = {
        labels["op"]: value
        for labels, value in prometheus.query(f'steer_edit_tokens_total{{dictionary="{NAME}"}}')
    }

    assert found == seen.changed
    assert set(found) == {"clamp", "add", "ablate", "scale"}
    assert min(found.values()) > 0
    assert prometheus.value("steer_edit_relative_size_count") == seen.reports
    assert prometheus.value("steer_edit_not_applied_total") == 0


def test_active_features_are_counted_once_a_row(prometheus: Prometheus, seen: Seen) -> None:
    name = f'{{dictionary="{NAME}"}}'

    assert prometheus.value(f"steer_dictionary_active_features_count{name}") == seen.full_width_rows
    assert prometheus.value(f"steer_dictionary_active_features_sum{name}") == seen.active


def test_calls_refusals_and_updates_are_counted(prometheus: Prometheus, seen: Seen) -> None:
    calls = {
        (labels["grpc_method"], labels["grpc_code"]): value
        for labels, value in prometheus.query(
            'grpc_server_handled_total{grpc_service=~"steer[.].+"}'
        )
    }

    assert calls == seen.calls
    refused = prometheus.query("steer_requests_rejected_total")
    assert [(labels["reason"], value) for labels, value in refused] == [("UNKNOWN_FEATURE", 2)]
    assert prometheus.value("steer_live_update_latency_seconds_count") == seen.updates == 2


def test_vllms_own_metrics_come_from_the_same_port_and_count_the_same_tokens(
    prometheus: Prometheus, seen: Seen, vllm_before: dict[str, float], server: Addresses
) -> None:
    phases = {"vllm:prompt_tokens_total": "prompt", "vllm:generation_tokens_total": "generated"}
    for name, phase in phases.items():
        of_client = sum(n for (which, _), n in seen.tokens.items() if which == phase)
        here = f'sum({name}{{instance="{server.metrics}", job="steer"}})'
        assert prometheus.value(here) - vllm_before[name] == of_client, name

    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert [value for _, value in prometheus.query(name)] == [0], name


def test_a_scrape_stays_far_below_the_limits_and_drops_creation_times(
    prometheus: Prometheus, exposition: str
) -> None:
    samples = prometheus.value('scrape_samples_post_metric_relabeling{job="steer"}')

    assert 100 < samples < 2000
    assert "steer_edit_not_applied_created" in exposition
    assert prometheus.query('{__name__=~".+_created"}') == []
