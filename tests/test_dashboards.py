"""The shipped Grafana dashboard and alert rules ask for what is there, in PromQL that Prometheus can read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from promql_parser import BinaryExpr, Expr, VectorSelector

from stanch.accounts import Account
from stanch.cli import explain
from stanch.events import ConnectionSevered
from stanch.ledger import Stats
from stanch.measuring import Measuring
from stanch.prometheus import StanchCollector
from tests.support.pages import blocks_of

yaml: Any = import_module("yaml")  # it ships no types

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
DASHBOARD: dict[str, Any] = json.loads((ASSETS / "grafana-dashboard.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ASSETS / "prometheus-alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLES: dict[str, dict[str, Any]] = {each["name"]: each for each in DASHBOARD["templating"]["list"]}

BY_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds to what it scrapes."""


def questions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, by where it stands; Grafana's variables replaced as Grafana does."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in GRAPHS:
        for target in panel["targets"]:
            asked: str = target["expr"]
            for name, meant in (("$__rate_interval", "5m"), ("$__range", "1h")):
                asked = asked.replace(f"[{name}]", f"[{meant}]")
            yield f"{panel['title']} {target['refId']}", asked


QUESTIONS = dict(questions())


class Measured:
    """A database that has something to tell in every family."""

    def __init__(self) -> None:
        both = Stats(pool_size=1, max_overflow=0, in_use=0, idle=0, waiting=0)
        self.name = "main"
        self.measuring = Measuring("main", stats=lambda: both.with_readers(both), holders=lambda: ())
        self.measuring.closed(Account("GET /"))
        self.measuring.note(ConnectionSevered(database="main", reason="a test"))

    def measure(self) -> Measuring:
        return self.measuring


@pytest.fixture(scope="module")
def exposed() -> dict[str, list[dict[str, str]]]:
    """The labels of each series that a scrape gives, by its name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in StanchCollector(Measured()).collect():  # type: ignore[arg-type]  # as far as it is used
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def selectors(expression: Expr) -> list[VectorSelector]:
    found: list[VectorSelector] = []

    def see(node: Expr) -> bool:
        if isinstance(node, VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(expression, see)
    return found


# Both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_a_question_is_promql_about_series_that_are_exposed(
    asked: str, exposed: dict[str, list[dict[str, str]]]
) -> None:
    """Its name, its labels, and the values it compares them with."""
    chosen = selectors(promql_parser.parse(asked))
    assert chosen
    for selector in chosen:
        assert selector.name is not None
        name: str = selector.name
        assert name in exposed, name
        for matcher in selector.matchers.matchers:
            if matcher.name in BY_PROMETHEUS or matcher.value.startswith("$"):
                continue
            values = {labels[matcher.name] for labels in exposed[name]}
            assert set(matcher.value.split("|")) <= values, (name, matcher.name, values)


@pytest.mark.parametrize("asked", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_a_question_groups_by_labels_that_are_there(
    asked: str, exposed: dict[str, list[dict[str, str]]]
) -> None:
    names = re.findall(r"\b(?:by|without) \(([^)]*)\)", asked)
    labels = {
        label
        for selector in selectors(promql_parser.parse(asked))
        for label in exposed[selector.name or ""][0]
    }
    for name in names:
        assert {each.strip() for each in name.split(",")} <= labels | BY_PROMETHEUS, name


@pytest.mark.parametrize("asked", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_a_counter_is_only_asked_how_fast_it_rises(asked: str) -> None:
    """And a rate comes before the sum: the sum of counters of several processes falls when one of them ends."""
    for name in re.findall(r"\b\w+(?:_total|_bucket|_count|_sum)\b(?=\{|\[)", asked):
        if name != "db_client_connection_count":
            assert re.search(rf"(?:rate|increase)\({name}[{{\[]", asked), name


def test_every_family_is_asked_for_somewhere(exposed: dict[str, list[dict[str, str]]]) -> None:
    """A metric that no panel shows is one that nobody looks at."""
    asked = {
        selector.name
        for question in QUESTIONS.values()
        for selector in selectors(promql_parser.parse(question))
    }
    families = {
        re.sub(r"_(?:bucket|sum|count)$", "", name) if "_seconds_" in name else name for name in exposed
    }
    unasked = {name for name in families if not any(str(each).startswith(name) for each in asked)}
    assert unasked == set()


def test_the_reference_names_every_family_with_its_labels() -> None:
    page = (ASSETS.parent / "reference" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (gauge|counter|histogram) \|([^|]*)\|", page, re.MULTILINE)
    told = {(name, kind): set(re.findall(r"`(\w+)`", labels)) for name, kind, labels in rows}
    families = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type): {
            label
            for sample in family.samples
            for label in sample.labels
            if label not in {"database", "pid", "le"}
        }
        for family in StanchCollector(Measured()).collect()  # type: ignore[arg-type]  # as far as it is used
    }
    assert told.keys() == families.keys()
    for family, labels in families.items():
        assert labels <= told[family], family


# Alerts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    """Its runbook is a command that prints a page."""
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    command, verb, code = rule["annotations"]["runbook"].split()
    assert (command, verb) == ("stanch", "explain")
    assert code in explain.codes()
    assert "$labels.database" in rule["annotations"]["summary"]
    assert isinstance(promql_parser.parse(rule["expr"]), BinaryExpr), "it compares with something"
    assert promql_parser.parse_duration(rule.get("for", "1m"))


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) >= 6
    assert all(name.startswith("Stanch") for name in names)


@pytest.mark.parametrize("page", ["health", "metrics"])
def test_what_a_page_shows_as_yaml_is_yaml(page: str) -> None:
    blocks = [
        block
        for block in blocks_of((ASSETS.parent / "how-to" / f"{page}.md").read_text())
        if block.language == "yaml"
    ]
    assert blocks
    for block in blocks:
        assert isinstance(yaml.safe_load(block.body), dict)


# The dashboard ----------------------------------------------------------------------------------------------


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"]
    assert DASHBOARD["uid"]
    assert "id" not in DASHBOARD, "an id of another Grafana would overwrite what has it there"
    identities = [panel["id"] for panel in PANELS]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("panel", GRAPHS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["type"] in {"timeseries", "stat"}
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == sorted(set(letters))
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        grouped = {
            label.strip()
            for found in re.findall(r"by \(([^)]*)\)", target["expr"])
            for label in found.split(",")
        }
        assert shown <= grouped, target["legendFormat"]


def test_no_two_panels_lie_upon_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]


def test_every_variable_is_used_and_every_used_one_is_there(exposed: dict[str, list[dict[str, str]]]) -> None:
    whole = json.dumps([GRAPHS, [each.get("query") for each in VARIABLES.values()]])
    used = set(re.findall(r"\$\{?(?!__)(\w+)", whole))
    assert used == set(VARIABLES)
    for variable in VARIABLES.values():
        if variable["type"] == "query":
            name, label = re.fullmatch(
                r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["definition"]
            ).groups()  # type: ignore[union-attr]  # else it fails here
            assert label in {*exposed[name][0], *BY_PROMETHEUS}
            assert variable["query"]["query"] == variable["definition"]


def test_a_planted_wrong_question_is_found(exposed: dict[str, list[dict[str, str]]]) -> None:
    for wrong in (
        "db_client_connections_count",
        'db_client_connection_count{status="used"}',
        'db_client_connection_count{state="in_use"}',
    ):
        with pytest.raises((AssertionError, KeyError)):
            test_a_question_is_promql_about_series_that_are_exposed(wrong, exposed)
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum by (rate(x[5m])")
    with pytest.raises(AssertionError):
        test_a_counter_is_only_asked_how_fast_it_rises("sum(stanch_waits_total{end='x'})")
