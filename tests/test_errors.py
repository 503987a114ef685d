import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from flask import Flask, abort
from flask.testing import FlaskClient
from werkzeug.exceptions import default_exceptions

from errors import ApiError, Code, Message
from storage import database
from tests.blueprints.callers import Caller
from tests.harness import Simulator, bearer

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def failing(make_app: Callable[..., Flask]) -> FlaskClient:
    """A client of the application with routes that fail in their own ways."""

    app = make_app()

    def crash() -> None:
        raise RuntimeError("the secret reason")

    def fail(name: str) -> None:
        raise ApiError(Code[name])

    def fail_with_message() -> None:
        raise ApiError(Code.FORBIDDEN, message=Message("用户未同意", "The user did not consent"))

    app.add_url_rule("/abort/<int:code>", view_func=abort, endpoint="abort")
    app.add_url_rule("/crash", view_func=crash)
    app.add_url_rule("/fail/<name>", view_func=fail)
    app.add_url_rule("/fail-with-message", view_func=fail_with_message)
    return app.test_client(use_cookies=False)


def test_what_cannot_be_opened_for_lack_of_descriptors_is_503(make_app: Callable[..., Flask]) -> None:
    app = make_app()

    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number), "/a/file")

    app.add_url_rule("/fail/<int:number>", view_func=fail)
    client = app.test_client(use_cookies=False)
    for number, code in ((errno.EMFILE, 503), (errno.ENFILE, 503), (errno.EIO, 500)):
        answer = client.get(f"/fail/{number}", headers={"Accept-Language": "en"})
        assert (answer.status_code, answer.get_json()["code"]) == (code, code)
        assert ("Retry-After" in answer.headers) == (code == 503)
        assert b"file" not in answer.data


def test_an_error_of_ours_after_the_view_is_itself_and_no_outage(
    make_app: Callable[..., Flask], journal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ApiError(Code.UNAVAILABLE)

    app = make_app()
    monkeypatch.setattr(app.session_interface, "save_session", fail)  # as where the request's time is over
    answer = app.test_client(use_cookies=False).get("/livez")
    assert (answer.status_code, answer.get_json()["code"]) == (503, 503)
    assert "is unavailable" not in journal.in_process.getvalue()


@pytest.mark.database
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT secret_column FROM users",
        "SELECT 1 FROM secret_table",
        "INSERT INTO idempotency_keys (secret_column) VALUES (1)",
        "INSERT INTO identities (app_id, openid, user_id, created_at) VALUES ('secret', 'a', 4711, 0)",
        "UPDATE users SET role = NULL",
        "SELEC secret",
    ],
)
def test_what_the_database_says_of_tables_and_columns_is_in_no_response(
    make_app: Callable[..., Flask],
    simulator: Simulator,
    log_lines: Callable[[], list[dict[str, Any]]],
    statement: str,
) -> None:
    app = make_app()
    app.add_url_rule("/fail", view_func=lambda: str(database.session.execute(sqlalchemy.text(statement))))
    Caller(app, simulator)  # a row to change
    answer = app.test_client(use_cookies=False).get("/fail", headers={"Accept-Language": "en"})
    (code,) = [code for code in Code if code.number == answer.status_code in (409, 500, 503)]
    assert answer.get_json() == {"code": code.number, "message": code.message.english, "data": None}
    assert "secret" not in str(answer.headers)
    lines = log_lines()
    assert any("database" in line["message"] or "exceptionType" in line for line in lines)
    assert any("stack" in line for line in lines) == (code.number == 500)  # the others are no faults of the code


def test_a_message_replaces_that_of_the_code(failing: FlaskClient) -> None:
    for language, message in (("zh", "用户未同意"), ("en", "The user did not consent")):
        answer = failing.get("/fail-with-message", headers={"Accept-Language": language})
        assert answer.get_json() == {"code": 403, "message": message, "data": None}


def test_numbers_are_unique() -> None:
    assert len({code.number for code in Code}) == len(Code)


def test_codes_of_client_errors_are_4xx_and_of_server_errors_5xx() -> None:
    for code in Code:
        assert (400 <= code.number < 500) == (400 <= code.status < 500)
        assert (500 <= code.number < 600) == (500 <= code.status < 600)


def test_each_code_has_its_status_in_the_envelope(failing: FlaskClient) -> None:
    for code in set(Code) - {Code.SUCCESS}:
        answer = failing.get(f"/fail/{code.name}")
        assert answer.status_code == code.status
        assert answer.get_json() == {"code": code.number, "message": code.message.chinese, "data": None}
        assert code.message.chinese.encode() in answer.data  # as UTF-8, not escaped
        assert (int(answer.headers.get("Retry-After", 0)) > 0) == (code.status in (429, 503))
        assert ("WWW-Authenticate" in answer.headers) == (code.status == 401)


def test_clients_come_back_at_different_times(failing: FlaskClient) -> None:
    waits = {failing.get("/fail/UNAVAILABLE").headers["Retry-After"] for _ in range(100)}
    assert waits == {"1", "2", "3", "4", "5"}


@pytest.mark.parametrize(
    ("language", "english"),
    [
        (None, False),
        ("", False),
        ("zh-CN,en;q=0.8", False),
        ("zh-CN,zh;q=0.9,en;q=0.8", False),
        ("zh-Hant-TW, en;q=0.9", False),
        ("zh_CN,en;q=0.9", False),  # as wx.getAppBaseInfo writes it
        ("ZH-cn,EN;q=0.9", False),
        ("en;q=0.8,zh-CN", False),
        ("zh-TW;q=0,zh;q=0.9,en;q=0.5", False),
        ("en-US,en;q=0.9,zh;q=0.5", True),
        ("en-US", True),
        ("EN-gb,zh-CN;q=0.9", True),
        ("fr,en;q=0.5", True),
        ("fr,en-AU;q=0.5,zh-HK;q=0.4", True),
        ("fr", False),
        ("english,zhuang", False),
        ("zh,en", False),
        ("en,zh", True),
        ("*", False),
        ("*,en;q=0.5", False),
        ("en-US,*;q=0.5", True),
        ("fr,*;q=0.5", False),
        ("zh;q=0", True),
        ("zh-CN;q=0,*", True),
        ("en;q=0", False),
        ("en;q=0,*", False),
        ("zh;q=0,en;q=0", False),
        ("*;q=0", False),
        ("en;q=0.001,*;q=0", True),
        ("not a language; q=x", False),
        ("zh-CN;q=2,en;q=0.1", True),  # a malformed q: the range is ignored
        (";;,,q=1, en ;q=0.3", True),
        ("-,_,é", False),
        ("fr-FR;q=0.7," * 680 + "en;q=0.5", True),
    ],
)
def test_messages_are_chinese_unless_english_is_preferred(
    client: FlaskClient, language: str | None, english: bool
) -> None:
    headers = {"Accept-Language": language} if language else {}
    for path, code in (("/nowhere", Code.NOT_FOUND), ("/livez", Code.SUCCESS)):
        message = client.get(path, headers=headers).get_json()["message"]
        assert message == (code.message.english if english else code.message.chinese)


def test_only_a_response_with_errors_refers_to_them(failing: FlaskClient) -> None:
    statuses = {*default_exceptions} - {code.status for code in Code} | {400}
    assert {400, 414, 416, 417, 422, 431, 501} <= statuses
    for status in statuses:
        for language, text in (("zh", "无法处理该请求"), ("en", "This request cannot be handled")):
            answer = failing.get(f"/abort/{status}", headers={"Accept-Language": language})
            reason = default_exceptions[status]().name
            message, number = f"{text}{'：' if language == 'zh' else ': '}{reason}", 400 if status < 500 else 500
            assert answer.status_code == status
            assert answer.get_json() == {"code": number, "message": message, "data": None}
    assert "data.errors" in failing.post("/api/v1/auth/wechat", json={}).get_json()["message"]


def test_every_failure_is_in_the_envelope_with_a_trace_id(failing: FlaskClient) -> None:
    login = {"path": "/api/v1/auth/wechat", "method": "POST"}
    requests: list[tuple[dict[str, Any], int, int]] = [
        ({"path": "/nowhere"}, 404, 404),
        ({"path": "/api/v1/users/me/nothing"}, 404, 404),
        ({"path": "/livez", "method": "DELETE"}, 405, 405),
        ({"path": "/livez", "method": "BREW"}, 405, 405),
        ({**login, "data": " " * 2_000_000, "headers": JSON}, 413, 413),
        ({"path": "/crash"}, 500, 500),
        ({"path": "/fail/WECHAT_REFUSED"}, 502, 520),
    ]
    for request, status, number in requests:
        answer = failing.open(**request)
        assert (answer.status_code, answer.content_type) == (status, "application/json"), request
        body = json.loads(answer.data)
        assert (list(body), body["code"]) == (["code", "message", "data"], number)
        assert len(answer.headers["X-Trace-Id"]) == 32
    not_allowed = failing.put(login["path"])
    assert set(not_allowed.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


def test_a_body_that_is_not_a_json_object_in_utf_8_is_400(client: FlaskClient) -> None:
    for body in (
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 8000,
        b"9" * 5000,
        b'{"code": "\\ud800"}',
        b'{"\xed\xa0\x80": ""}',
        '{"\\udfff": ""}'.encode("utf-16"),
    ):
        answer = client.post("/api/v1/auth/wechat", data=body, headers=JSON)
        assert (answer.status_code, answer.get_json()["code"]) == (400, 400), body[:20]
        assert answer.get_json()["data"]["errors"]


def test_invalid_input_names_the_fields(client: FlaskClient) -> None:
    answer = client.post("/api/v1/auth/wechat", json={"coed": "x"})
    assert set(answer.get_json()["data"]["errors"]) == {"code", "coed"}


def test_an_unavailable_database_is_503_and_logged_with_the_reason(
    make_app: Callable[..., Flask], token: str, tmp_path: Path, log_lines: Any
) -> None:
    app = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/no/such/folder.db")
    answer = app.test_client().get("/api/v1/users/me", headers=bearer(token))
    assert (answer.status_code, answer.get_json()["code"]) == (503, 503)
    assert "the database is unavailable: unable to open database file" in str(log_lines())


def test_a_crash_is_logged_with_the_trace_id_and_hidden_from_the_client(failing: FlaskClient, log_lines: Any) -> None:
    answer = failing.get("/crash")
    assert "secret reason" not in answer.text
    (line,) = [line for line in log_lines() if "stack" in line]
    assert line["level"] == "ERROR"
    assert line["traceId"] == answer.headers["X-Trace-Id"]
    assert (line["exceptionType"], line["exceptionMessage"]) == ("RuntimeError", "the secret reason")
    assert __file__ in line["stack"]
