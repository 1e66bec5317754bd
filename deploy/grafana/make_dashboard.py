"""Writes dashboards/features.json beside it; with --check, exits with 1 if that file is not current."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "features.json"

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HERE = 'job=~"$job", instance=~"$instance"'
_DICTIONARY = f'{_HERE}, dictionary="$dictionary"'
_FEATURE = f'{_DICTIONARY}, feature=~"$feature"'
_NOT_OK = f'{_HERE}, grpc_code!="OK"'
_GENERATED = f'{_HERE}, phase="generated"'
_QUANTILES = (("p50", 0.5), ("p95", 0.95))
_WIDTH = 24
_HEIGHT = 8


def rate(metric: str, labels: str = _HERE) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def quantiles(metric: str, by: str = "", labels: str = _HERE) -> list[tuple[str, str]]:
    """Median and p95 of a histogram, each with its legend."""
    names = f"le, {by}" if by else "le"
    buckets = f"sum by ({names}) ({rate(f'{metric}_bucket', labels)})"
    legend = f", {by} {{{{{by}}}}}" if by else ""
    return [(f"histogram_quantile({q}, {buckets})", f"{p}{legend}") for p, q in _QUANTILES]


def labelled(expression: str) -> str:
    """The feature series of `expression` with the features' labels, which only the info series has."""
    info = f"max by (dictionary, feature, label) (steer_feature_info{{{_FEATURE}}})"
    return f"({expression}) * on (dictionary, feature) group_left (label) {info}"


# As steer:rows:rate5m of ../prometheus/alerts.yml, for the interval on screen.
_DONE = f'{_HERE}, finish_reason=~"stop|length"'
ROWS = (
    f"(sum({rate('steer_tokens_total')}) - sum({rate('steer_requests_total', _DONE)})"
    f" - sum({rate('vllm:prompt_tokens_cached_total')}))"
)
_FIRED = f"sum by (dictionary, feature) ({rate('steer_feature_activation_count', _FEATURE)})"
_STRENGTH = f"sum by (dictionary, feature) ({rate('steer_feature_activation_sum', _FEATURE)})"
_L0_SUM = f"sum by (dictionary) ({rate('steer_dictionary_active_features_sum', _DICTIONARY)})"
_L0_COUNT = f"sum by (dictionary) ({rate('steer_dictionary_active_features_count', _DICTIONARY)})"


def panel(
    kind: str,
    title: str,
    queries: Sequence[tuple[str, str]],
    unit: str = "short",
    *,
    width: int = 8,
    about: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A panel of Grafana's `kind`; `queries` are expressions with their legends."""
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": _DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "editorMode": "code",
                "expr": expression,
                "legendFormat": legend,
                "range": True,
            }
            for index, (expression, legend) in enumerate(queries)
        ],
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "gridPos": {"x": 0, "y": 0, "w": width, "h": _HEIGHT},
        **more,
    }


def lines(
    title: str, queries: Sequence[tuple[str, str]], unit: str = "short", **more: Any
) -> dict[str, Any]:
    legend = {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]}
    options = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel("timeseries", title, queries, unit, options=options, **more)


def number(title: str, expression: str, **more: Any) -> dict[str, Any]:
    options = {"colorMode": "value", "graphMode": "none"}
    return panel("stat", title, [(expression, "")], options=options, width=4, **more)


def heatmap() -> dict[str, Any]:
    buckets = rate("steer_feature_activation_bucket", _FEATURE).replace("rate(", "increase(", 1)
    made = panel(
        "heatmap",
        "Activations of feature $feature",
        [(f"sum by (le) ({buckets})", "{{le}}")],
        about="How often it had which activation, where it was active. Buckets are shares of its "
        "largest activation in its training text, if that is known.",
        repeat="feature",
        repeatDirection="h",
        maxPerRow=3,
        options={
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "yAxis": {"unit": "short"},
            "cellGap": 1,
        },
    )
    made["targets"][0]["format"] = "heatmap"
    return made


def watch_list() -> dict[str, Any]:
    info = f"max by (dictionary, feature, label) (steer_feature_info{{{_FEATURE}}})"
    hidden = {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}
    made = panel("table", "Watched features", [(info, "")], transformations=[hidden], width=6)
    made["targets"][0] |= {"format": "table", "instant": True, "range": False}
    return made


def of_features() -> list[dict[str, Any]]:
    name = "{{feature}} {{label}}"
    firing = labelled(f"{_FIRED} / on () group_left () ({ROWS} > 0)")
    about = "Share of the computed tokens on which the feature was active."
    return [
        lines("Firing rate", [(firing, name)], "percentunit", width=9, about=about),
        lines(
            "Mean activation where active",
            [(labelled(f"{_STRENGTH} / ({_FIRED} > 0)"), name)],
            width=9,
        ),
        watch_list(),
        heatmap(),
    ]


def of_dictionary() -> list[dict[str, Any]]:
    active = quantiles("steer_dictionary_active_features", "dictionary", _DICTIONARY)
    return [
        lines(
            "Active features per token (L0)",
            [*active, (f"{_L0_SUM} / ({_L0_COUNT} > 0)", "mean")],
            width=12,
            about="Of the tokens that clients read out at full width.",
        ),
        lines(
            "Time to encode, per engine output",
            quantiles("steer_encode_seconds", "dictionary", _DICTIONARY),
            "s",
            width=12,
        ),
    ]


def of_edits() -> list[dict[str, Any]]:
    changed = f"sum by (dictionary, op) ({rate('steer_edit_tokens_total')})"
    return [
        lines("Tokens changed per second", [(changed, "{{dictionary}} {{op}}")]),
        lines(
            "Relative size of an edit's change",
            quantiles("steer_edit_relative_size"),
            about="Length of the change over the length of x. Above 1 the change is longer than x.",
        ),
        lines(
            "Live update until it holds",
            quantiles("steer_live_update_latency_seconds"),
            "s",
            width=4,
        ),
        number(
            "Edits not applied",
            f"sum(increase(steer_edit_not_applied_total{{{_HERE}}}[$__range]))",
            about="Must be 0: such generations fail.",
        ),
    ]


def of_requests() -> list[dict[str, Any]]:
    tokens = f"sum by (phase, steered) ({rate('steer_tokens_total')})"
    requests = f"sum by (rpc, steered, finish_reason) ({rate('steer_requests_total')})"
    refused = f"sum by (reason) ({rate('steer_requests_rejected_total')})"
    failed = f"sum by (grpc_code) ({rate('grpc_server_handled_total', _NOT_OK)})"
    seconds = f"sum by (steered) ({rate('steer_request_seconds_sum')})"
    generated = f"sum by (steered) ({rate('steer_tokens_total', _GENERATED)})"
    name = "steered {{steered}}"
    return [
        lines("Tokens per second", [(tokens, "{{phase}}, " + name)]),
        lines("Requests per second", [(requests, "{{rpc}}, {{finish_reason}}, " + name)], "reqps"),
        lines(
            "Refused and failed calls per second",
            [(refused, "{{reason}}"), (failed, "{{grpc_code}}")],
            "reqps",
        ),
        lines(
            "Time to first token", quantiles("steer_time_to_first_token_seconds", "steered"), "s"
        ),
        lines("Time of a request", quantiles("steer_request_seconds", "steered"), "s"),
        lines(
            "Time per generated token",
            [(f"{seconds} / ({generated} > 0)", name)],
            "s",
            about="Whole requests, prompts included: compare like with like.",
        ),
    ]


def of_engine() -> list[dict[str, Any]]:
    requests = [
        (f"sum(vllm:num_requests_{state}{{{_HERE}}})", state) for state in ("running", "waiting")
    ]
    cache = f"vllm:kv_cache_usage_perc{{{_HERE}}}"
    used, slots = (f'steer_edit_slots{{{_HERE}, state="{state}"}}' for state in ("used", "all"))
    full = f"{used} / ignoring(state) {slots}"
    return [
        number("Engine up", f"min(steer_engine_up{{{_HERE}}})"),
        lines("Requests in vLLM", requests, width=10),
        lines("KV cache in use", [(cache, "{{instance}}")], "percentunit", width=10),
        lines("Edit slots in use", [(full, "{{instance}} {{site}}")], "percentunit", width=12),
        lines(
            "Waiting for edit slots",
            [(f"steer_requests_waiting_for_slots{{{_HERE}}}", "{{instance}}")],
            width=12,
        ),
    ]


ROW_PANELS = {
    "Watched features": of_features,
    "Dictionary $dictionary": of_dictionary,
    "Edits": of_edits,
    "Steered (1) and not (0)": of_requests,
    "Engine": of_engine,
}


def variable(name: str, query: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "query",
        "name": name,
        "label": name.capitalize(),
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
    } | more


def variables() -> list[dict[str, Any]]:
    every: dict[str, Any] = {"includeAll": True, "multi": True, "allValue": ".*"}
    datasource = {"type": "datasource", "name": "datasource", "query": "prometheus"}
    return [
        datasource | {"label": "Data source", "hide": 0},
        variable("job", "label_values(steer_build_info, job)", **every),
        variable("instance", 'label_values(steer_build_info{job=~"$job"}, instance)', **every),
        variable("dictionary", f"label_values(steer_dictionary_info{{{_HERE}}}, dictionary)"),
        # No allValue: Grafana repeats the heatmap over the values themselves.
        variable(
            "feature",
            f"label_values(steer_feature_info{{{_DICTIONARY}}}, feature)",
            includeAll=True,
            multi=True,
        ),
    ]


def placed() -> list[dict[str, Any]]:
    """All panels with their places: rows one under the other, filled from the left."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROW_PANELS.items():
        place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        row = {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place}
        made.append(row)
        x, y = 0, y + 1
        for entry in panels():
            width = entry["gridPos"]["w"]
            if x + width > _WIDTH:
                x, y = 0, y + _HEIGHT
            made.append(entry | {"gridPos": entry["gridPos"] | {"x": x, "y": y}})
            x += width
        y += _HEIGHT
    return [entry | {"id": index} for index, entry in enumerate(made, 1)]


def dashboard() -> dict[str, Any]:
    return {
        "uid": "steer-features",
        "title": "Features",
        "description": "What the features of a served model do, and what clients do to them.",
        "tags": ["steer", "vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "time": {"from": "now-30m", "to": "now"},
        "refresh": "10s",
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": placed(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    text = json.dumps(dashboard(), indent=2) + "\n"
    if not parser.parse_args().check:
        FILE.write_text(text, encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != text:
        sys.exit(f"{FILE} is not what {Path(__file__).name} makes; run it without --check")


if __name__ == "__main__":
    main()
