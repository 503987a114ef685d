import json
import logging
import threading
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, run_wsgi_app

from telemetry.traces import current_ids
from tests.harness import Simulator, bearer, counted, wait_until

Lines = Callable[[], list[dict[str, Any]]]


@pytest.mark.parametrize(
    ("path", "method", "route", "status"),
    [
        ("/livez", "GET", "/livez", 200),
        ("/docs/assets/favicon-16x16.png", "GET", "/docs/assets/<path:filename>", 200),
        ("/api/v1/users/me", "GET", "/api/v1/users/<user:user_id>", 401),
        ("/a/path/with/13812345678", "GET", None, 404),
        ("/livez", "DELETE", None, 405),
    ],
)
def test_a_request_has_one_line_with_its_route_and_never_its_path(
    client: FlaskClient, log_lines: Lines, path: str, method: str, route: str | None, status: int
) -> None:
    answer = client.open(f"{path}?secret=in-the-query", method=method)
    answer.close()
    (line,) = log_lines()
    assert line["message"] == "request"
    assert (line["method"], line.get("route"), line["status"]) == (method, route, status)
    assert line["code"] == status
    assert line["traceId"] == answer.headers["X-Trace-Id"]
    assert 0 <= line["durationMs"] < 10_000
    assert "in-the-query" not in str(line)
    assert "13812345678" not in str(line)


def test_a_line_says_who_asked_and_so_does_each_line_before_it(
    app: Flask, client: FlaskClient, log_lines: Lines, token: str
) -> None:
    user_id = client.get("/api/v1/users/me", headers=bearer(token)).get_json()["data"]["id"]
    client.get("/api/v1/users/me/personal-data/full", headers=bearer(token))
    audit, request = log_lines()[-2:]
    assert (audit["message"], request["message"]) == ("audit", "request")
    for line in (audit, request):
        assert (line["userId"], line["method"]) == (user_id, "GET")
        assert line["route"] == "/api/v1/users/<user:user_id>/personal-data/full"
        assert (line["traceId"], line["spanId"]) == (request["traceId"], request["spanId"])


def test_a_probe_rejected_because_of_a_stop_is_no_error(
    client: FlaskClient, log_lines: Lines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert client.get("/readyz").status_code == 200
    (tmp_path / "stopping").touch()
    assert client.get("/readyz").get_json()["data"] == {"errors": {"instance": ["Stopping."]}}
    assert [(line["level"], line["status"]) for line in log_lines()] == [("INFO", 200), ("INFO", 503)]


def test_a_login_says_whose_it_is(client: FlaskClient, simulator: Simulator, log_lines: Lines) -> None:
    user = client.post("/api/v1/auth/wechat", json={"code": simulator.code()}).get_json()["data"]["user"]
    assert log_lines()[-1]["userId"] == user["id"]


def test_what_fails_is_an_error_and_what_the_caller_did_wrong_is_none(app: Flask, log_lines: Lines) -> None:
    @app.get("/crash")
    def crash() -> None:
        raise RuntimeError

    client = app.test_client()
    client.get("/crash")
    client.get("/nowhere")
    lines = [line for line in log_lines() if line["message"] == "request"]
    assert [(line["level"], line["status"], line["code"]) for line in lines] == [
        ("ERROR", 500, 500),
        ("INFO", 404, 404),
    ]


@pytest.mark.parametrize("where", ["after", "teardown", "both"])
def test_a_hook_that_fails_costs_neither_answer_nor_trace_id_nor_line_nor_count(
    app: Flask, log_lines: Lines, where: str
) -> None:
    @app.get("/last-hook-fails")
    def view() -> str:
        return "done"

    def fail(answer: object) -> Any:
        if request.path == "/last-hook-fails":
            raise RuntimeError
        return answer

    if where != "teardown":
        app.after_request(fail)
    if where != "after":
        app.teardown_request(fail)
    app.config["PROPAGATE_EXCEPTIONS"] = False
    answers: list[Any] = []
    body, status, headers = run_wsgi_app(app, EnvironBuilder("/last-hook-fails").get_environ())
    assert (json.loads(b"".join(body))["code"], status) == (500, "500 INTERNAL SERVER ERROR")
    assert {line["traceId"] for line in log_lines() if "stack" in line} == {headers["X-Trace-Id"]}
    app.wsgi_app(EnvironBuilder("/livez").get_environ(), lambda *answer: answers.append(answer))
    assert "X-Trace-Id" in dict(answers[0][1])
    lines = [line for line in log_lines() if line["message"] == "request"]
    assert [(line["route"], line["status"]) for line in lines] == [("/last-hook-fails", 500), ("/livez", 200)]
    assert counted("http_requests_in_flight") == 0
    assert current_ids() == {"traceId": None}


def test_work_in_the_background_has_the_fields_of_its_request_but_not_of_the_response(
    app: Flask, log_lines: Lines
) -> None:
    ended = threading.Event()

    @app.get("/later")
    def later() -> str:
        def work() -> None:
            ended.wait(5)
            logging.getLogger(__name__).info("at work")

        threading.Thread(target=copy_context().run, args=(work,)).start()
        return "soon"

    app.test_client().get("/later")
    ended.set()
    wait_until(lambda: len(log_lines()) == 2)
    first, second = log_lines()
    assert (first["message"], first["status"]) == ("request", 200)
    assert (second["message"], second["route"], second["method"]) == ("at work", "/later", "GET")
    assert second["traceId"] == first["traceId"]
    assert not second.keys() & {"status", "code", "durationMs"}


def test_a_trace_that_the_caller_began_goes_on(client: FlaskClient, log_lines: Lines) -> None:
    answer = client.get("/livez", headers={"traceparent": f"00-{'a' * 32}-0123456789abcdef-01"})
    assert answer.headers["X-Trace-Id"] == "a" * 32
    (line,) = log_lines()
    assert (line["traceId"], line["parentSpanId"]) == ("a" * 32, "0123456789abcdef")


def test_a_method_that_nobody_knows_is_not_written_as_it_came(client: FlaskClient, log_lines: Lines) -> None:
    client.open("/livez", method="HUNTER2")
    assert log_lines()[-1]["method"] == "OTHER"


def test_requests_are_counted_by_template_and_measured(client: FlaskClient) -> None:
    known = {"route": "/api/v1/users/<user:user_id>", "method": "GET", "status": "401", "code": "401"}
    unknown = {"route": "unmatched", "method": "GET", "status": "404", "code": "404"}
    before = [counted("http_requests_total", **labels) for labels in (known, unknown)]
    client.get("/api/v1/users/13812345678")
    client.get("/api/v1/users/me")
    client.get("/somewhere/13812345678")
    after = [counted("http_requests_total", **labels) for labels in (known, unknown)]
    assert after == [before[0] + 2, before[1] + 1]
    assert counted("http_request_duration_seconds_bucket", route=known["route"], method="GET", le="+Inf") >= 2
    assert counted("http_requests_in_flight") == 0


def test_logins_are_counted_by_outcome(client: FlaskClient, simulator: Simulator) -> None:
    def state() -> list[float]:
        route = {"route": "/api/v1/auth/wechat", "method": "POST"}
        return [
            counted("http_requests_total", **route, status=status, code=code)
            for status, code in (("200", "200"), ("400", "460"))
        ]

    before = state()
    client.post("/api/v1/auth/wechat", json={"code": simulator.code()})
    client.post("/api/v1/auth/wechat", json={"code": "0a1b2c3d"})
    assert [now - then for now, then in zip(state(), before, strict=True)] == [1, 1]
