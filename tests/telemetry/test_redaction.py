import html
import json
import logging
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from flask import Flask, request
from sqlalchemy import select

from blueprints.parsing import JsonParser
from concurrency import background
from settings import Settings
from storage import database
from storage.models import User
from telemetry import redaction
from telemetry.redaction import HIDDEN, TEXT_CHARACTERS, hide, scrub
from tests.harness import APP_SECRET, PERSON, bearer, wait_until

Lines = Callable[[], list[dict[str, Any]]]
SECRETS = {
    "a phone number": "13812345678",
    "one in groups": "138-1234-5678",
    "one from abroad": "+447911123456",
    "an identity card": "11010119491231002X",
    "a bank card": "6222 0202 0011 2230 123",
    "an address": "ouyang.feng+x@mail.example.com",
    "a name": "欧阳锋",
    "a name as JSON": json.dumps("欧阳锋"),
    "a session token": "u2bIkPp0kBIdT6Gdpg8hTRT4y7BCgVKNmEhWRd5z0Wg",
    "a session_key": "tiihtNczf5v6AKRyjwEUhQ==",
    "an openid": "oGZUI0egBJY1zhBYw2KhdUfwVJJE",
    "a hash": "9f86d081884c7d659a2feaa0c55ad015",
}
LOOKALIKE = pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)

logger = logging.getLogger("some.part")


def raise_it(value: Any) -> None:
    try:
        try:
            raise KeyError(value)
        except KeyError as error:
            raise ValueError(f"it was {value}") from error
    except ValueError:
        logger.exception("it failed")


WAYS: dict[str, Callable[[Any], None]] = {
    "argument": lambda value: logger.info("it was %s", value),
    "argument as it is represented": lambda value: logger.info("it was %r of %d", value, 3),
    "argument by name": lambda value: logger.info("it was %(name)s", {"name": value}),
    "argument that is a mapping": lambda value: logger.info("it was %s", [{"field": value}]),
    "message put together": lambda value: logger.info(f"it was {value}"),  # noqa: G004
    "message that is no text": lambda value: logger.info({"it": value}),
    "declared field": lambda value: logger.info("it", extra={"reason": f"it was {value}"}),
    "declared list": lambda value: logger.info("it", extra={"columns": ["one", value]}),
    "other field": lambda value: logger.info("it", extra={"phone": value}),
    "name of a field": lambda value: logger.info("it", extra={str(value): 1}),
    "exception": raise_it,
}


@pytest.fixture
def way(request: pytest.FixtureRequest, log_lines: Lines) -> Callable[[Any], dict[str, Any]]:
    """Log a value in one of the ways there are, and answer the line."""

    def log(value: Any) -> dict[str, Any]:
        WAYS[request.param](value)
        return log_lines()[-1]

    return log


@LOOKALIKE
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_what_looks_like_a_secret_reaches_no_line(way: Callable[[Any], dict[str, Any]], secret: str) -> None:
    assert secret not in json.dumps(way(secret), ensure_ascii=False)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_what_is_in_hand_reaches_no_line_whatever_it_looks_like(way: Callable[[Any], dict[str, Any]]) -> None:
    hide({"names": ["Ouyang Feng", b"Western Poison"]})
    assert "Ouyang" not in json.dumps(way("Ouyang Feng"))
    assert "Poison" not in json.dumps(way("the Western Poison!"))


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_no_secret_of_the_settings_reaches_a_line(way: Callable[[Any], dict[str, Any]], app: Flask) -> None:
    for text in (APP_SECRET, f"https://api/x?appid=wx1&secret={APP_SECRET}", f"in the{APP_SECRET}middle"):
        assert APP_SECRET not in json.dumps(way(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:pass@host:6379/0", f"redis://{HIDDEN}@host:6379/0"),
        ("GET /x?phone=1&b=2 HTTP/1.1", f"GET /x?{HIDDEN} HTTP/1.1"),
        ("Authorization: Bearer abc", f"Authorization: {HIDDEN} {HIDDEN}"),
        ("access_token=abc&openid=o-x", f"access_token={HIDDEN}&openid={HIDDEN}"),
        ("{'nickname': 'Ouyang Feng', 'phone': 138, 'n': 1}", f"{{'nickname': {HIDDEN}, 'phone': {HIDDEN}, 'n': 1}}"),
        ("ouyang%40example.com", HIDDEN),
    ],
)
def test_what_has_a_telling_name_or_place_is_hidden(text: str, shown: str) -> None:
    assert scrub(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "errcode 40029: invalid code, rid: 61fb0a7d-5b3e8a3b-2f1c9d3e",
        "Error 111 connecting to 127.0.0.1:6379. Connection refused.",
        "(2003, \"Can't connect to MySQL server on '127.0.0.1' ([Errno 111] Connection refused)\")",
        "UNIQUE constraint failed: users.openid",
        "Duplicate entry '…' for key 'uq_users_unionid'".replace(HIDDEN, "x"),
        "/sns/jscode2session",
        "/usr/lib/python3.11/site-packages/flask/app.py",
        "Booting worker with pid: 1234567",
        "KeyError: 'user_id'",
        "exit code: 137, status code: 502 at 2026-01-02 03:04:05",
        "Access denied for user 'root'@'localhost' (using password: YES)",
    ],
)
def test_what_finds_a_fault_stays_readable(text: str) -> None:
    assert scrub(text) == text


@pytest.mark.parametrize(
    "value",
    ['O\'Brien "Joe" Smith', "Old\nMcDonald", "Jane Roe", "C:\\Users\\Joe", " Jane Roe "],
    ids=lambda value: value[:4],
)
@pytest.mark.parametrize(
    "form", [repr, str.strip, json.dumps, quote, quote_plus, html.escape, lambda value: [[[{"name": value}]]]]
)
def test_what_is_in_hand_is_hidden_however_it_is_quoted(value: str, form: Callable[[str], object]) -> None:
    hide({"told": value})
    assert not {"Brien", "McDonald", "Jane", "Roe", "Joe"}.intersection(
        re.findall("[A-Za-z]+", scrub(str(form(value))))
    )


def test_values_that_are_none_push_none_out_of_hand() -> None:
    hide("the first one")
    for _ in range(redaction.REMEMBERED):
        hide(None, None)
    assert scrub("the first one") == HIDDEN


def test_who_sends_too_many_values_has_none_shown() -> None:
    hide([f"value {number}" for number in range(6000)])
    assert scrub("anything") == HIDDEN


def test_an_argument_after_a_telling_name_is_hidden(log_lines: Lines) -> None:
    logger.info("password=%s, nickname: %s, %d left", "hunter2x", "Alice", 3)
    logger.info("phone %s", 13812345678.0)
    assert [line["message"] for line in log_lines()] == [
        f"password={HIDDEN}, nickname: {HIDDEN}, 3 left",
        f"phone {HIDDEN}.0",
    ]


def test_a_host_of_the_settings_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_hosts", set())
    host = "r-bp1zxszhcgatnx12.redis.rds.aliyuncs.com"
    assert host not in scrub(f"Error 111 connecting to {host}:6379.")
    redaction.hide_settings({"REDIS_URL": f"redis://:password-of-redis@{host}:6379/0"})
    assert scrub(f"Error 111 connecting to {host}:6379.") == f"Error 111 connecting to {host}:6379."
    assert scrub("it is password-of-redis!") == f"it is {HIDDEN}!"
    assert scrub("it is the other one!") == "it is the other one!"
    redaction.hide_settings({"DATABASE_URL": "mysql://host/name?charset=utf8mb4&password=the+other+one"})
    assert scrub("it is the other one, in utf8mb4!") == f"it is {HIDDEN}, in utf8mb4!"


def test_a_password_in_a_url_of_the_settings_is_hidden_as_it_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_hosts", set())
    redaction.hide_settings({"DATABASE_URL": "mysql://user:p%40ss%2Fw@host/name"})
    assert scrub("it is p@ss/w!") == f"it is {HIDDEN}!"


def test_a_long_text_is_cut_and_nothing_secret_is_cut_in_two() -> None:
    for before in range(TEXT_CHARACTERS - 50, TEXT_CHARACTERS + 1):
        shown = scrub("word " * (before // 5) + "w" * (before % 5) + SECRETS["a session token"] + " word" * 10_000)
        assert len(shown) <= TEXT_CHARACTERS + 1
        assert SECRETS["a session token"][:8] not in shown


def test_a_short_value_is_hidden_only_as_a_word_of_its_own() -> None:
    hide("word")
    assert scrub("a word of sword and wordy") == f"a {HIDDEN} of sword and wordy"


def test_what_stands_in_the_source_is_shown_whatever_is_in_hand(log_lines: Lines) -> None:
    hide("the message")
    logger.warning("the message: 库存不足, %s left", 3)
    assert log_lines()[-1]["message"] == "the message: 库存不足, 3 left"


def test_every_setting_is_a_secret_or_known_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_hosts", set())
    values = {name: f"redis://user:{name}@host" if name.endswith("_URL") else name for name in Settings().fields}
    redaction.hide_settings(values)
    harmless = {name for name in values if name not in redaction._secrets}
    assert {name for name in harmless if not name.startswith("SESSION_")} == {
        "WECHAT_APP_ID",
        "WECHAT_ACCOUNT_APP_ID",
        "WECHAT_WEBSITE_APP_ID",
        "WECHAT_CONTENT_CHECK",
        "TRUST_WXCLOUD_HEADERS",
        "PORT",
        "WEB_CONCURRENCY",
        "WEB_THREADS",
        "DRAIN_SECONDS",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "LOG_LEVEL",
    }


def test_what_a_request_brings_reads_and_decrypts_is_in_hand(app: Flask, log_lines: Lines) -> None:
    told = {"nickname": "Ouyang Feng", "email": "nobody at home", "remark": "leave at the door"}

    @app.post("/mistake")
    def mistake() -> None:
        body = JsonParser().load_json(request, None)  # type: ignore[arg-type]
        user = database.session.scalars(select(User).where(User.openid == "o-in-hand")).one()
        raise RuntimeError(
            f"{body['remark']}, {user.nickname}, {user.openid}, {user.email}, {request.headers['Authorization']}, "
            f"{request.args['q']}, {request.cookies['crumb']}"
        )

    with app.app_context():
        database.session.add(User(app_id="wx1", openid="o-in-hand", nickname=told["nickname"], email=told["email"]))
        database.session.commit()
    answer = app.test_client(use_cookies=False).post(
        "/mistake?q=what was asked",
        json={"remark": told["remark"]},
        headers={**bearer("short-token"), "Cookie": "crumb=chocolate"},
    )
    assert answer.status_code == 500, answer.text
    (line,) = [line for line in log_lines() if "exceptionMessage" in line]
    assert line["exceptionMessage"] == f"{HIDDEN}, {HIDDEN}, {HIDDEN}, {HIDDEN}, Bearer {HIDDEN}, {HIDDEN}, {HIDDEN}"
    assert not any(value in str(line) for value in [*told.values(), "short-token", "what was", "chocolate"])


@pytest.mark.parametrize(
    "sent", [{"json": {"note": ["the note"]}}, {"data": {"note": ["a", "the note"]}}, {"data": "the note"}]
)
def test_what_a_view_reads_by_flasks_own_ways_is_in_hand(app: Flask, log_lines: Lines, sent: dict[str, Any]) -> None:
    @app.post("/mistake")
    def mistake() -> None:
        texts = (request.get_json(silent=True), request.form.getlist("note"), request.get_data(as_text=True))
        raise RuntimeError(" and ".join(map(str, texts)))

    app.test_client().post("/mistake", **sent)
    (line,) = [line for line in log_lines() if "exceptionMessage" in line]
    assert "the note" not in str(line)
    assert HIDDEN in line["exceptionMessage"]


def test_what_a_request_sent_is_in_hand_of_what_it_began_too(app: Flask, log_lines: Lines) -> None:
    def fail(words: str) -> None:
        raise RuntimeError(words)

    @app.get("/begins")
    def begin() -> str:
        background.submit(fail, request.args["q"])
        return "begun"

    app.test_client().get("/begins?q=what was asked")
    (line,) = wait_until(lambda: [line for line in log_lines() if "exceptionMessage" in line])
    assert line["exceptionMessage"] == HIDDEN


def test_the_person_of_the_tests_looks_personal_to_it() -> None:
    assert not [name for name, value in PERSON.items() if value in scrub(f"this is {value}.")]
