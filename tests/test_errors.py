import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from errors import ApiError, Code, Message
from tests.harness import bearer

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def failing(make_app: Callable[..., Flask]) -> FlaskClient:
    """A client of the application with routes that fail in ways of their own."""

    app = make_app()

    def crash() -> None:
        raise RuntimeError("the secret reason")

    def fail(name: str) -> None:
        raise ApiError(Code[name])

    app.add_url_rule("/crash", view_func=crash)
    app.add_url_rule("/fail/<name>", view_func=fail)
    return app.test_client(use_cookies=False)


def test_an_error_may_say_more_than_its_code_does(make_app: Callable[..., Flask]) -> None:
    app = make_app()

    def fail() -> None:
        raise ApiError(Code.FORBIDDEN, message=Message("用户未同意", "The user did not consent"))

    app.add_url_rule("/fail", view_func=fail)
    client = app.test_client()
    assert client.get("/fail").get_json() == {"code": 403, "message": "用户未同意", "data": None}
    answer = client.get("/fail", headers={"Accept-Language": "en"})
    assert answer.get_json()["message"] == "The user did not consent"


def test_numbers_are_unique() -> None:
    assert len({code.number for code in Code}) == len(Code)


def test_the_callers_faults_are_in_the_400s_and_ours_in_the_500s() -> None:
    for code in Code:
        assert (400 <= code.number < 500) == (400 <= code.status < 500)
        assert (500 <= code.number < 600) == (500 <= code.status < 600)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.SUCCESS], ids=lambda code: code.name)
def test_each_code_answers_with_its_status_in_the_envelope(failing: FlaskClient, code: Code) -> None:
    answer = failing.get(f"/fail/{code.name}")
    assert answer.status_code == code.status
    assert answer.get_json() == {"code": code.number, "message": code.message.chinese, "data": None}
    assert code.message.chinese.encode() in answer.data  # as UTF-8, not escaped
    assert (int(answer.headers.get("Retry-After", 0)) > 0) == (code.status in (429, 503))
    assert ("WWW-Authenticate" in answer.headers) == (code.status == 401)


@pytest.mark.parametrize(
    ("language", "english"),
    [
        (None, False),
        ("zh-CN,zh;q=0.9,en;q=0.8", False),
        ("en-US,en;q=0.9,zh;q=0.5", True),
        ("fr", False),
        ("*", False),
        ("not a language; q=x", False),
    ],
)
def test_messages_are_chinese_unless_english_is_preferred(
    failing: FlaskClient, language: str | None, english: bool
) -> None:
    answer = failing.get("/fail/NOT_FOUND", headers={"Accept-Language": language} if language else {})
    assert answer.get_json()["message"] == (
        Code.NOT_FOUND.message.english if english else Code.NOT_FOUND.message.chinese
    )
    success = failing.get("/livez", headers={"Accept-Language": language} if language else {})
    assert success.get_json()["message"] == (Code.SUCCESS.message.english if english else Code.SUCCESS.message.chinese)


@pytest.mark.parametrize(
    ("request_", "status", "number"),
    [
        ({"path": "/nowhere"}, 404, 404),
        ({"path": "/api/v1/users/me/nothing"}, 404, 404),
        ({"path": "/livez", "method": "DELETE"}, 405, 405),
        ({"path": "/livez", "method": "BREW"}, 405, 405),
        (
            {"path": "/api/v1/auth/wechat", "method": "POST", "data": b'{"a": "\xed\xa0\x80"}', "headers": JSON},
            400,
            400,
        ),
        (
            {
                "path": "/api/v1/auth/wechat",
                "method": "POST",
                "data": '{"\\udfff": ""}'.encode("utf-16"),
                "headers": JSON,
            },
            400,
            400,
        ),
        ({"path": "/api/v1/auth/wechat", "method": "POST", "data": {"code": "x"}}, 415, 415),
        ({"path": "/api/v1/auth/wechat", "method": "POST", "data": " " * 2_000_000, "headers": JSON}, 413, 413),
        ({"path": "/crash"}, 500, 500),
        ({"path": "/fail/WECHAT_REFUSED"}, 502, 520),
    ],
)
def test_every_failure_answers_in_the_envelope_with_a_trace_id(
    failing: FlaskClient, request_: dict[str, Any], status: int, number: int
) -> None:
    answer = failing.open(**request_)
    assert answer.status_code == status
    assert answer.content_type == "application/json"
    body = json.loads(answer.data)
    assert list(body) == ["code", "message", "data"]
    assert body["code"] == number
    assert len(answer.headers["X-Trace-Id"]) == 32


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"code": "\\ud800"}',
        b'{"\xed\xa0\x80": ""}',
        '{"\\udfff": ""}'.encode("utf-16"),
    ],
)
def test_a_body_that_is_no_json_object_in_utf_8_is_400(client: FlaskClient, body: bytes) -> None:
    answer = client.post("/api/v1/auth/wechat", data=body, headers=JSON)
    assert (answer.status_code, answer.get_json()["code"]) == (400, 400)
    assert answer.get_json()["data"]["errors"]


def test_a_database_that_is_away_is_503_and_the_log_says_why(
    make_app: Callable[..., Flask], token: str, tmp_path: Path, log_lines: Any
) -> None:
    app = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/no/such/folder.db")
    answer = app.test_client().get("/api/v1/users/me", headers=bearer(token))
    assert (answer.status_code, answer.get_json()["code"]) == (503, 503)
    assert "the database is unavailable: unable to open database file" in str(log_lines())


def test_a_405_says_which_methods_are_allowed(client: FlaskClient) -> None:
    assert set(client.put("/api/v1/auth/wechat").headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


def test_invalid_fields_are_named(client: FlaskClient) -> None:
    answer = client.post("/api/v1/auth/wechat", json={"coed": "x"})
    assert set(answer.get_json()["data"]["errors"]) == {"code", "coed"}


def test_a_crash_shows_nothing_of_itself_and_is_logged_with_its_trace_id(failing: FlaskClient, log_lines: Any) -> None:
    answer = failing.get("/crash")
    assert "secret reason" not in answer.text
    (line,) = [line for line in log_lines() if "stack" in line]
    assert line["level"] == "ERROR"
    assert line["traceId"] == answer.headers["X-Trace-Id"]
    assert (line["exceptionType"], line["exceptionMessage"]) == ("RuntimeError", "the secret reason")
    assert __file__ in line["stack"]
