from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from telemetry.logs import trace_id
from tests.harness import bearer

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
    assert (line["method"], line["route"], line["status"]) == (method, route, status)
    assert line["traceId"] == answer.headers["X-Trace-Id"]
    assert 0 <= line["durationMs"] < 10_000
    assert "in-the-query" not in str(line)
    assert "13812345678" not in str(line)


def test_each_request_has_a_trace_id_of_its_own(client: FlaskClient) -> None:
    assert client.get("/livez").headers["X-Trace-Id"] != client.get("/livez").headers["X-Trace-Id"]
    assert trace_id.get() is None


def test_no_token_is_logged(client: FlaskClient, log_lines: Lines, token: str) -> None:
    client.get("/api/v1/users/me", headers=bearer(token))
    client.get(f"/api/v1/users/{token}")
    assert log_lines()
    assert token not in str(log_lines())
