"""The alarms and the dashboard: whatever they ask for is counted, each alarm is tried, and says what to do.

`promtool` and `amtool` come with Debian's prometheus and prometheus-alertmanager; `.ci/run` installs them,
and tries rules.test.yml, which plays days and so takes a minute.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import yaml
from flask import Flask
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from telemetry import metrics
from tests.harness import METRICS_TOKEN, ROOT, Service, Simulator, bearer

FOLDER = ROOT / "deploy" / "prometheus"
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALARMS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
CASES = yaml.safe_load((FOLDER / "rules.test.yml").read_text())["tests"]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
VARIABLES = {"$__rate_interval": "1m", "$job": "kuaishang", "$instance": ".*"}

OF_PROMETHEUS = {"job", "instance"}
"""The labels that it adds to whatever it scrapes."""
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
OPERATORS = {"and", "or", "unless"}
FIRING = 'count by (alertname, instance, job) (ALERTS{alertstate="firing"})'


def queries() -> dict[str, str]:
    """All that Prometheus is asked, by where it stands."""
    found = {f"{rule.get('alert') or rule['record']} {number}": rule["expr"] for number, rule in enumerate(RULES)}
    for name, alarm in ALARMS.items():
        for query in re.findall(r'range printf "((?:\\.|[^"])*)"', alarm["annotations"]["description"]):
            found[f"description of {name}"] = query.replace("%q", '"kuaishang"').replace('\\"', '"')
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found[f"${variable['name']}"] = re.sub(
                r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", variable["definition"]
            )
    for name, value in VARIABLES.items():
        found = {place: query.replace(name, value) for place, query in found.items()}
    assert not [query for query in found.values() if "$" in query]
    return found


QUERY = pytest.mark.parametrize("query", [pytest.param(query, id=place) for place, query in queries().items()])


def series() -> dict[str, set[str]]:
    """All that there is to ask for: the names of the series, with their labels."""
    there = {"up": OF_PROMETHEUS, "ALERTS": {"alertname", "alertstate", *OF_PROMETHEUS}}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[metric._type]:
                more = {"le"} if suffix == "_bucket" else set()
                there[metric._name + suffix] = {*metric._labelnames, *more, *OF_PROMETHEUS}
    return there | {rule["record"]: {"job"} for rule in RULES if "record" in rule}


def read(query: str) -> tuple[list[tuple[str, set[str]]], set[str]]:
    """The series of a query in PromQL, each with the labels by which it is chosen, and the labels that it groups by."""
    for inside in (r'"(?:\\.|[^"\\])*"', r"\[.*?\]"):  # texts and durations
        query = re.sub(inside, "", query)
    grouping = r"\b(?:by|on) *\((.*?)\)"
    grouped = {label.strip() for labels in re.findall(grouping, query) for label in labels.split(",")}
    chosen = re.findall(r"\b([a-zA-Z_][\w:]*)\b(?! *\()(?:\{(.*?)\})?", re.sub(grouping, "", query))
    return [(name, set(re.findall(r"\w+", labels))) for name, labels in chosen if name not in OPERATORS], grouped


@QUERY
def test_a_query_names_series_that_exist_and_labels_that_they_have(query: str) -> None:
    there = series()
    chosen, grouped = read(query)
    assert chosen
    assert {name for name, _ in chosen} <= there.keys()
    for name, labels in chosen:
        assert labels <= there[name], name
    assert grouped <= set().union(*(there[name] for name, _ in chosen))


def answered(service: Service) -> dict[str, set[str]]:
    """The names of the series that a service answers to Prometheus, with their labels and those that this adds."""
    answer = requests.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=10)
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {sample.name: {*sample.labels, *OF_PROMETHEUS} for sample in samples}


def test_the_service_answers_what_the_dashboard_and_the_alarms_ask_for(
    start_service: Callable[..., Service], simulator: Simulator
) -> None:
    service = start_service()
    token = service.log_in(simulator)
    assert service.call("GET", "/auth/wechat", token).json()["data"] == {"valid": True}  # takes an access token
    there = answered(service)
    of_rules = {rule.get("record") for rule in RULES} | {"up", "ALERTS"}
    asked_for = [(name, labels) for query in queries().values() for name, labels in read(query)[0]]
    assert [name for name, labels in asked_for if name not in of_rules and not labels <= there.get(name, set())] == []


def test_every_metric_is_on_the_dashboard() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            assert any(re.search(rf"\b{metric._name}", query) for query in queries), metric._name


def test_every_panel_shows_the_chosen_instances_of_the_chosen_deployment() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            for name, labels in read(target["expr"])[0]:
                of_all_instances = name == "ALERTS" or name.startswith("job:")
                assert labels >= ({"job"} if of_all_instances else OF_PROMETHEUS), target["expr"]


def test_probes_do_not_count_for_the_objectives(app: Flask) -> None:
    there = {rule.rule for rule in app.url_map.iter_rules()}
    selectors = [selector for rule in RULES for selector in re.findall(r"kuaishang_http_\w+\{(.*?)\}", rule["expr"])]
    assert selectors
    for selector in selectors:
        (probes,) = re.findall(r'route!~"(.*?)"', selector)
        assert set(probes.split("|")) == {"/livez", "/readyz", "/version", "/metrics"} <= there


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_says_whom_it_wakes_and_what_to_do_first(name: str) -> None:
    alarm = ALARMS[name]
    assert alarm["labels"]["severity"] in ("page", "ticket")
    assert alarm["annotations"].keys() == {"summary", "description", "runbook"}
    assert "\n" not in alarm["annotations"]["runbook"].strip()
    assert "`" in alarm["annotations"]["runbook"]  # a command, or what to search for


@pytest.mark.parametrize("name", ALARMS)
@pytest.mark.parametrize("state", ["fires", "is quiet"])
def test_an_alarm_has_a_case_in_which_it_fires_and_one_in_which_it_is_quiet(name: str, state: str) -> None:
    cases = [case for case in CASES if case["name"].startswith(f"{name} {state}")]
    assert cases
    for case in cases:
        looks = [look for look in case["promql_expr_test"] if look["expr"] == FIRING]
        assert looks == case["promql_expr_test"]
        fired = any(f'"{name}"' in sample["labels"] for look in looks for sample in look["exp_samples"])
        assert fired == (state == "fires"), case["name"]


def run(tool: str, *arguments: str, folder: Path = FOLDER) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    outcome = subprocess.run([tool, *arguments], cwd=folder, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_prometheus_takes_its_configuration_and_the_rules(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "prometheus")
    (folder / "metrics_token").write_text("what-an-operator-puts-there")
    run("promtool", "check", "config", "prometheus.yml", folder=folder)
    run("promtool", "check", "rules", "--lint-fatal", "rules.yml", folder=folder)


def test_prometheus_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries().values())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    run("promtool", "check", "rules", "queries.yml", folder=tmp_path)


def test_alertmanager_takes_its_configuration() -> None:
    run("amtool", "check-config", "alertmanager.yml")


@pytest.mark.parametrize("severity", sorted({alarm["labels"]["severity"] for alarm in ALARMS.values()}))
def test_alertmanager_has_a_receiver_for_each_severity(severity: str) -> None:
    run(
        "amtool",
        "config",
        "routes",
        "test",
        "--config.file=alertmanager.yml",
        f"--verify.receivers={severity}",
        f"severity={severity}",
    )
