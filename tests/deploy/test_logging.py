import fnmatch
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import yaml
from flask import Flask

from blueprints import message_handlers
from telemetry.fields import FIELDS
from tests.blueprints.callers import ORDER, Caller
from tests.blueprints.test_messages import EVENT, TEXT, URL, push, settled, signed
from tests.harness import ROOT, Simulator

FOLDER = ROOT / "deploy" / "logging"
README = (FOLDER / "README.md").read_text()
TEMPLATE = json.loads((FOLDER / "index-template.json").read_text())
MAPPINGS = TEMPLATE["template"]["mappings"]
PYTHON_TYPES = {"text": str, "keyword": str, "long": int, "float": int | float, "boolean": bool}

Lines = Callable[[], list[dict[str, Any]]]


def test_every_field_is_mapped_with_its_type_and_nothing_else_is() -> None:
    assert {name: mapping["type"] for name, mapping in MAPPINGS["properties"].items()} == FIELDS
    assert MAPPINGS["dynamic"] is False


def test_no_odd_value_makes_elasticsearch_refuse_a_line() -> None:
    assert TEMPLATE["template"]["settings"] == {"index.mapping.ignore_malformed": True}
    # A longer one than 32,766 bytes it would refuse.
    assert all(it["ignore_above"] == 1024 for it in MAPPINGS["properties"].values() if it["type"] == "keyword")


def test_filebeat_writes_where_the_template_applies() -> None:
    filebeat = yaml.safe_load((FOLDER / "filebeat.yml").read_text())
    (pattern,) = TEMPLATE["index_patterns"]
    assert filebeat["setup.template.pattern"] == pattern
    assert fnmatch.fnmatch(filebeat["output.elasticsearch"]["index"], pattern)
    assert "data_stream" in TEMPLATE  # so @timestamp is mapped by Elasticsearch itself


def test_filebeat_reads_lines_and_takes_their_time() -> None:
    filebeat = yaml.safe_load((FOLDER / "filebeat.yml").read_text())
    inputs = filebeat["filebeat.inputs"]
    assert len({reader["id"] for reader in inputs}) == len(inputs) == 2
    for reader in inputs:
        assert reader["parsers"][-1]["ndjson"] == {"target": "", "overwrite_keys": True, "ignore_decoding_error": True}
    (processor,) = filebeat["processors"]
    (example,) = processor["timestamp"]["test"]
    assert FIELDS[processor["timestamp"]["field"]] == "date"
    assert datetime.fromisoformat(example).isoformat(timespec="milliseconds").replace("+00:00", "Z") == example


def test_what_is_typed_into_kibana_names_fields_that_exist() -> None:
    queries = re.findall(r"^\|.*\| `([^`|]*)` \|$", README, re.MULTILINE)
    assert any("traceId" in query for query in queries)
    for query in queries:
        named = re.findall(r"([\w@.]+)\s*(?::|[<>]=?)", re.sub(r'"[^"]*"', '""', query))
        assert named
        assert set(named) <= FIELDS.keys(), query
    columns = set(re.findall(r"`(\w+)`", README.partition("add the\ncolumns ")[2].partition("\n\n")[0]))
    assert "message" in columns
    assert columns <= FIELDS.keys()


def test_the_commands_name_the_files_that_are_there() -> None:
    named = set(re.findall(r"deploy/logging/[\w.-]+", README))
    assert named == {f"deploy/logging/{path.name}" for path in FOLDER.iterdir() if path.name != "README.md"}
    for path in named:
        assert (ROOT / path).is_file()


def fits(value: object, kind: str) -> bool:
    """Whether Elasticsearch takes it; any field may have several values, or be null."""
    if isinstance(value, list):
        return all(fits(part, kind) for part in value)
    if isinstance(value, bool) and kind != "boolean":
        return False
    if kind == "date":
        return isinstance(value, str) and bool(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", value))
    if kind == "long":
        return isinstance(value, int) and -(2**31) <= value < 2**31
    return value is None or isinstance(value, PYTHON_TYPES[kind])


def test_what_the_service_really_writes_is_mapped(
    make_app: Callable[..., Flask], simulator: Simulator, log_lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    client = app.test_client(use_cookies=False)

    def fail(message: dict[str, Any]) -> None:
        raise ValueError(message["MsgType"])

    monkeypatch.setattr(message_handlers, "handlers", {**message_handlers.handlers, ("text", ""): [fail]})
    monkeypatch.setattr(message_handlers, "responders", {("text", ""): [fail]})
    app.add_url_rule("/crash", "crash", lambda: 1 / 0)  # type: ignore[arg-type, return-value]

    client.get("/version", headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    client.get("/no/such/place")
    assert client.get("/crash").status_code == 500
    caller = Caller(app, simulator, openid="o-logged", role="admin")
    for fault in ({"kind": "not_json"}, {"kind": "errcode", "errcode": 45009}, {"kind": "errcode", "errcode": 40029}):
        simulator.fault(**fault)
        client.post("/api/v1/auth/wechat", json={"code": simulator.code()})
    caller.call("PUT", "/users/me/phone", {"code": simulator.phone_code()})
    caller.post("/orders", {**ORDER, "items": []})
    caller.get(f"/users/{Caller(app, simulator).id}/personal-data/full")
    push(client, TEXT)
    push(client, {**EVENT, "Event": "user_authorization_revoke", "OpenID": "o-logged", "RevokeInfo": "8"})
    client.post(URL, query_string=signed(token="other"), json=EVENT)
    settled(app)

    lines = log_lines()
    seen = {name for line in lines for name in line}
    assert seen <= FIELDS.keys()
    assert "undeclared" not in seen
    assert [(line, name) for line in lines for name, value in line.items() if not fits(value, FIELDS[name])] == []
    assert seen >= {"spanId", "parentSpanId", "route", "status", "code", "durationMs", "userId", "instance", "version"}
    assert seen >= {"exceptionType", "exceptionMessage", "stack", "interface", "reason", "function"}
    assert seen >= {"type", "event", "repeat", "handlers", "columns", "aboutUserId", "expiresIn", "forced"}
