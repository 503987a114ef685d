"""The alarms and the dashboard: their queries name existing series, and each alarm has test cases and a runbook.

`promtool` and `amtool` come with Debian's prometheus and prometheus-alertmanager; `.ci/run` installs them,
and tries rules.test.yml, which plays days and so takes a minute.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import requests
import yaml
from flask import Flask
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from errors import Code
from telemetry import metrics
from tests.harness import METRICS_TOKEN, ROOT, WAIT_SECONDS, Service, Simulator, bearer, wait_until
from wechat import errcodes

FOLDER = ROOT / "deploy" / "prometheus"
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALARMS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
CASES = yaml.safe_load((FOLDER / "rules.test.yml").read_text())["tests"]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
VARIABLES = {"$__rate_interval": "1m", "$job": "kuaishang", "$instance": ".*"}

OF_PROMETHEUS = {"job", "instance"}
"""The labels that it adds to whatever it scrapes."""
OF_HAPROXY = {
    "haproxy_server_status": {"proxy", "server", "state"},
    "haproxy_backend_active_servers": {"proxy"},
    "haproxy_backend_retry_warnings_total": {"proxy"},
    "haproxy_backend_redispatch_warnings_total": {"proxy"},
    "haproxy_frontend_http_responses_total": {"proxy", "code"},
}
"""The labels of its series; test_haproxy.py finds them in a scrape."""
SUFFIXES = {
    "counter": ["_total"],
    "gauge": [""],
    "summary": ["_count", "_sum"],
    "histogram": ["_bucket", "_count", "_sum"],
}
OPERATORS = {"and", "or", "unless", "offset"}
FIRING = 'count by (alertname, instance, job) (ALERTS{alertstate="firing"})'


def queries() -> dict[str, str]:
    """Every query of the rules and the dashboard, by its place."""
    found = {f"{rule.get('alert') or rule['record']} {number}": rule["expr"] for number, rule in enumerate(RULES)}
    for name, alarm in ALARMS.items():
        for query in re.findall(r'range printf "((?:\\.|[^"])*)"', "".join(alarm["annotations"].values())):
            found[f"{name}: {query}"] = query.replace("%q", '"kuaishang"').replace('\\"', '"')
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        found[annotation["name"]] = annotation["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found[f"${variable['name']}"] = re.sub(
                r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", variable["definition"]
            )
    for name, value in VARIABLES.items():
        found = {place: query.replace(name, value) for place, query in found.items()}
    assert not [query for query in found.values() if "$" in query.replace('"$1"', "")]  # of label_replace
    return found


def series() -> dict[str, set[str]]:
    """The labels of each series, by its name."""
    there = {"up": OF_PROMETHEUS, "ALERTS": {"alertname", "alertstate", *OF_PROMETHEUS}}
    there["ALERTS_FOR_STATE"] = {"alertname", "method", "route", *OF_PROMETHEUS}  # of SwitchedOff
    there |= {name: labels | OF_PROMETHEUS for name, labels in OF_HAPROXY.items()}
    for metric in (*vars(metrics).values(), *metrics.PROCESS.values()):
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[metric._type]:
                more = {"le"} if suffix == "_bucket" else set()
                more |= {"pid"} if getattr(metric, "_multiprocess_mode", "") == "liveall" else set()
                there[metric._name + suffix] = {*metric._labelnames, *more, *OF_PROMETHEUS}
    return there | {
        rule["record"]: set(rule["record"].partition(":")[0].split("_")) for rule in RULES if "record" in rule
    }


def read(query: str) -> tuple[list[tuple[str, set[str]]], set[str]]:
    """The series of a query in PromQL, each with the labels by which it is chosen, and the labels that it groups by."""
    for inside in (r'"(?:\\.|[^"\\])*"', r"\[.*?\]"):  # texts and durations
        query = re.sub(inside, "", query)
    grouping = r"\b(?:by|on) *\((.*?)\)"
    grouped = {label.strip() for labels in re.findall(grouping, query) for label in labels.split(",")}
    chosen = re.findall(r"\b([a-zA-Z_][\w:]*)\b(?! *\()(?:\{(.*?)\})?", re.sub(grouping, "", query))
    return [(name, set(re.findall(r"\w+", labels))) for name, labels in chosen if name not in OPERATORS], grouped


def test_queries_name_existing_series_and_their_labels() -> None:
    there = series()
    for place, query in queries().items():
        chosen, grouped = read(query)
        assert chosen, place
        assert {name for name, _ in chosen} <= there.keys(), place
        assert [name for name, labels in chosen if not labels <= there[name]] == [], place
        assert grouped <= set().union(*(there[name] for name, _ in chosen)), place


def test_a_scrape_has_every_series_that_the_queries_name(
    start_service: Callable[..., Service], simulator: Simulator
) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    token = service.log_in(simulator)
    assert service.call("GET", "/auth/wechat", token).json()["data"] == {"valid": True}  # takes an access token

    def scrape() -> str:
        return requests.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text

    wait_until(lambda: "\nkuaishang_messages_pending " in scrape())  # workers look for messages every two seconds
    scraped = scrape()
    samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
    there = {sample.name: {*sample.labels, *OF_PROMETHEUS} for sample in samples}
    of_others = {rule.get("record") for rule in RULES} | {"up", "ALERTS", "ALERTS_FOR_STATE"}
    of_others |= OF_HAPROXY.keys()
    named = [(name, labels) for query in queries().values() for name, labels in read(query)[0]]
    assert [name for name, labels in named if name not in of_others and not labels <= there.get(name, set())] == []


def test_an_instance_has_one_name_in_metrics_and_logs(start_service: Callable[..., Service]) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    scraped = requests.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text
    samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
    (build,) = [sample for sample in samples if sample.name == "kuaishang_build_info"]
    lines = wait_until(lambda: [line for line in service.log_lines() if line["message"] == "request"])
    assert {line["instance"] for line in lines} == {build.labels["name"]}


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
                of_all_instances = name == "ALERTS" or name.startswith(("job:", "haproxy_"))
                assert labels >= ({"job"} if of_all_instances else OF_PROMETHEUS), target["expr"]


def test_probes_do_not_count_for_the_objectives(app: Flask) -> None:
    there = {rule.rule for rule in app.url_map.iter_rules()}
    selectors = [
        selector
        for rule in RULES
        for selector in re.findall(r"kuaishang_http_requests?_(?:total|duration_\w+)\{(.*?)\}", rule["expr"])
    ]
    assert selectors
    for selector in selectors:
        (probes,) = re.findall(r'route!~"(.*?)"', selector)
        assert set(probes.split("|")) == {"/livez", "/readyz", "/version", "/metrics"} <= there


def test_alarms_name_their_severity_and_a_first_step() -> None:
    for name, alarm in ALARMS.items():
        assert alarm["labels"]["severity"] in ("page", "ticket"), name
        assert alarm["annotations"].keys() == {"summary", "description", "runbook"}, name
        assert "\n" not in alarm["annotations"]["runbook"].strip(), name
        assert "`" in alarm["annotations"]["runbook"], name  # a command, or text to search for


def test_each_alarm_has_a_case_in_which_it_fires_and_one_in_which_it_is_quiet() -> None:
    for name, state in product(ALARMS, ("fires", "is quiet")):
        cases = [case for case in CASES if case["name"].startswith(f"{name} {state}")]
        assert cases, (name, state)
        for case in cases:
            looks = [look for look in case["promql_expr_test"] if look["expr"] == FIRING]
            assert looks == case["promql_expr_test"], case["name"]
            fired = any(f'"{name}"' in sample["labels"] for look in looks for sample in look["exp_samples"])
            assert fired == (state == "fires"), case["name"]


def test_runbooks_explain_each_errcode_for_which_an_operator_must_act_or_wait() -> None:
    explained: dict[Code, set[int]] = {Code.WECHAT_REFUSED: set(), Code.UNAVAILABLE: set()}
    for alarm in ALARMS.values():
        _, _, act = alarm["annotations"]["runbook"].partition("An operator must act")
        act, _, wait = act.partition("Wait:")
        for code, text in ((Code.WECHAT_REFUSED, act), (Code.UNAVAILABLE, wait)):
            explained[code] |= {int(errcode) for errcode in re.findall(r"-1\b|\b\d{5}\b", text)}
    assert explained == {code: errcodes.ERRCODES[code] for code in explained}
    mentioned = re.findall(r"\b[4-9]\d{4}\b", (FOLDER / "rules.yml").read_text())
    assert {int(errcode) for errcode in mentioned} <= set().union(*explained.values())


def run(tool: str, *arguments: str, folder: Path = FOLDER) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    outcome = subprocess.run([tool, *arguments], cwd=folder, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_prometheus_accepts_its_configuration_the_rules_and_every_query(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "prometheus")
    (folder / "metrics_token").write_text("from-an-operator")
    run("promtool", "check", "config", "prometheus.yml", folder=folder)
    run("promtool", "check", "rules", "--lint-fatal", "rules.yml", folder=folder)
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries().values())]
    (folder / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    run("promtool", "check", "rules", "queries.yml", folder=folder)


def test_the_dashboard_marks_when_a_version_begins_to_serve(tmp_path: Path) -> None:
    def build(version: str, values: str) -> dict[str, str]:
        return {"series": f'kuaishang_build_info{{job="kuaishang",instance="a",version="{version}"}}', "values": values}

    def look(at: str, *versions: str) -> dict[str, object]:
        seen = [{"labels": f'{{version="{version}"}}', "value": 1} for version in versions]
        return {"expr": queries()["Versions that begin to serve"], "eval_time": at, "exp_samples": seen}

    # At two minutes a patch, which takes half a minute to hand over; at four minutes back.
    rows = [build("0.1.0+old", "1x9 stale _x6 1x9"), build("0.1.0+new", "_x8 1x9 stale")]
    looks = [look("1m45s"), look("2m", "0.1.0+new"), look("2m30s", "0.1.0+new"), look("3m"), look("4m15s", "0.1.0+old")]
    test = {"interval": "15s", "input_series": rows, "promql_expr_test": looks}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    run("promtool", "test", "rules", "test.yml", folder=tmp_path)


def test_alertmanager_accepts_its_configuration_and_has_a_receiver_for_each_severity() -> None:
    run("amtool", "check-config", "alertmanager.yml")
    for severity in {alarm["labels"]["severity"] for alarm in ALARMS.values()}:
        words = ["--config.file=alertmanager.yml", f"--verify.receivers={severity}", f"severity={severity}"]
        run("amtool", "config", "routes", "test", *words)
