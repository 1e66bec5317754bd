"""Which metrics a PromQL expression asks for, and the expressions that deploy/ ships."""

import json
import re
from typing import NamedTuple

import yaml

from tests.prometheus.processes import DEPLOY, RULES

DASHBOARD = DEPLOY / "grafana" / "dashboards" / "features.json"

_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_NOT_METRICS = re.compile(
    r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
)
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\()\b(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_LABEL_VALUES = re.compile(r"label_values\((.*), *(\w+)\)")


class Query(NamedTuple):
    where: str
    expression: str


def metric_names(expression: str) -> set[str]:
    """The names in it that are neither functions, keywords nor labels."""
    bare = _NOT_METRICS.sub(" ", _STRING.sub('""', expression))
    return set(_NAME.findall(bare)) - _WORDS


def family(name: str) -> str:
    """The metric that a sample of a counter or histogram belongs to."""
    return re.sub(r"_(?:total|bucket|sum|count)$", "", name)


def panel_queries() -> list[Query]:
    """As in the dashboard, with its variables in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        Query(f"{panel['title']}, {target['refId']}", target["expr"])
        for panel in panels
        for target in panel.get("targets", ())
    ]


def variable_queries() -> list[Query]:
    """The dashboard's variables that Grafana fills: name and the series it takes them from."""
    found = []
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            match = _LABEL_VALUES.fullmatch(variable["query"]["query"])
            assert match, variable
            found.append(Query(variable["name"], f"group by ({match[2]}) ({match[1]})"))
    return found


def rules() -> list[Query]:
    """The expressions of alerts and recording rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    entries = [rule for group in groups for rule in group["rules"]]
    return [Query(rule.get("alert") or rule["record"], rule["expr"]) for rule in entries]


def recorded() -> set[str]:
    """The metrics that the recording rules make."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def filled(expression: str, values: dict[str, str]) -> str:
    """The expression as Grafana sends it; KeyError if it has a variable without a value."""
    return _VARIABLE.sub(lambda match: values[match[1]], expression)
