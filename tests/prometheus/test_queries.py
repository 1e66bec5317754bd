"""Every query that deploy/ ships runs against a real Prometheus and finds what the server exposes."""

import re

import pytest

from tests.prometheus import promql
from tests.prometheus.processes import Prometheus, promtool
from tests.prometheus.traffic import NAME, WATCHED

pytestmark = [pytest.mark.prometheus, pytest.mark.timeout(900)]

_OF_PROMETHEUS = {"up", "scrape_samples_post_metric_relabeling"}
_QUIET = {"SteerAbsent", "SteerCallsFailing", "SteerOverloaded", "steer:calls_failed:ratio_rate5m"}
VALUES = {
    "job": ".*",
    "instance": ".*",
    "dictionary": NAME,
    "feature": "|".join(map(str, WATCHED)),
    "__rate_interval": "1m",
    "__range": "30m",
}


@pytest.mark.parametrize("query", promql.panel_queries(), ids=lambda query: query.where)
def test_every_panel_shows_something(prometheus: Prometheus, query: promql.Query) -> None:
    assert prometheus.query(promql.filled(query.expression, VALUES))


@pytest.mark.parametrize("query", promql.variable_queries(), ids=lambda query: query.where)
def test_every_variable_has_a_value(prometheus: Prometheus, query: promql.Query) -> None:
    assert prometheus.query(promql.filled(query.expression, VALUES))


def test_the_label_join_keeps_every_watched_feature(prometheus: Prometheus) -> None:
    (firing,) = (q for q in promql.panel_queries() if q.where == "Firing rate, A")

    found = prometheus.query(promql.filled(firing.expression, VALUES))

    assert {int(labels["feature"]) for labels, _ in found} == set(WATCHED)
    assert all(0 <= value <= 1 for _, value in found)


@pytest.mark.parametrize("query", promql.rules(), ids=lambda query: query.where)
def test_the_operands_of_every_rule_exist(prometheus: Prometheus, query: promql.Query) -> None:
    """Its comparison may hold or not; what it compares has a value on a healthy server with traffic."""
    compared = re.sub(r"\s[<>=]=?\s*[0-9.]+\s*$", "", query.expression)

    found = prometheus.query(compared)

    assert bool(found) is (query.where not in _QUIET)


def test_prometheus_evaluates_every_rule_and_no_alert_fires(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]

    assert {rule["name"] for rule in rules} == {query.where for query in promql.rules()}
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_queries_ask_only_for_metrics_that_the_server_exposes(exposition: str) -> None:
    exposed = set(re.findall(r"^# TYPE (\S+)", exposition, re.MULTILINE))
    exposed |= set(re.findall(r"^([a-zA-Z_:][\w:]*)", exposition, re.MULTILINE))
    known = exposed | promql.recorded() | _OF_PROMETHEUS

    queries = promql.panel_queries() + promql.variable_queries() + promql.rules()
    unknown = {
        (query.where, name)
        for query in queries
        for name in promql.metric_names(query.expression)
        if name not in known and promql.family(name) not in known
    }

    assert unknown == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_what_is_shipped(arguments: tuple[str, ...]) -> None:
    result = promtool(*arguments)

    assert result.returncode == 0, result.stdout + result.stderr


def test_every_rule_has_a_promtool_test() -> None:
    tested = (promql.RULES.parent / "alerts_test.yml").read_text()

    assert [q.where for q in promql.rules() if f": {q.where}\n" not in tested] == []
