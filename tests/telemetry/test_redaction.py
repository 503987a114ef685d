import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from settings import Settings
from telemetry import redaction
from telemetry.redaction import HIDDEN, TEXT_CHARACTERS, scrub
from tests.harness import APP_SECRET, PERSON

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
    "a secret of the settings": APP_SECRET,
    "one inside a text": f"in the{APP_SECRET}middle",
}

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


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_secret_reaches_a_line(log_lines: Lines, way: Callable[[Any], None], secret: str) -> None:
    way(secret)
    line = json.dumps(log_lines()[-1], ensure_ascii=False)
    assert secret not in line
    assert APP_SECRET not in line


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
def test_the_value_after_a_telling_name_or_in_a_telling_place_is_hidden(text: str, shown: str) -> None:
    assert scrub(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "errcode 40029: invalid code, rid: 61fb0a7d-5b3e8a3b-2f1c9d3e",
        "Error 111 connecting to 127.0.0.1:6379. Connection refused.",
        "(2003, \"Can't connect to MySQL server on '127.0.0.1' ([Errno 111] Connection refused)\")",
        "UNIQUE constraint failed: users.openid",
        "Duplicate entry 'x' for key 'uq_users_unionid'",
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


@pytest.fixture
def other_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings are known; the caller names others."""
    with monkeypatch.context() as patch:
        patch.setattr(redaction, "_secrets", set())
        patch.setattr(redaction, "_hosts", set())
        redaction._scrub.cache_clear()
        yield
    redaction._scrub.cache_clear()


@pytest.mark.usefixtures("other_settings")
def test_urls_of_the_settings_hide_their_passwords_and_show_their_hosts() -> None:
    host = "r-bp1zxszhcgatnx12.redis.rds.aliyuncs.com"
    assert host not in scrub(f"Error 111 connecting to {host}:6379.")
    redaction.hide_settings({"REDIS_URL": f"redis://:p%40ss-of-redis@{host}:6379/0"})
    assert scrub(f"Error 111 connecting to {host}:6379.") == f"Error 111 connecting to {host}:6379."
    assert scrub("it is p@ss-of-redis or p%40ss-of-redis!") == f"it is {HIDDEN} or {HIDDEN}!"


@pytest.mark.usefixtures("other_settings")
def test_a_short_secret_is_hidden_only_as_a_word_of_its_own() -> None:
    redaction.hide_settings({"WECHAT_PUSH_TOKEN": "word"})
    assert scrub("a word of sword and wordy") == f"a {HIDDEN} of sword and wordy"


@pytest.mark.usefixtures("other_settings")
def test_every_setting_is_a_secret_or_known_to_be_none() -> None:
    values = {name: f"redis://user:{name}@host" if name.endswith("_URL") else name for name in Settings().fields}
    redaction.hide_settings(values)
    harmless = {name for name in values if name not in redaction._secrets}
    assert {name for name in harmless if not name.startswith("SESSION_")} == {
        "DOCS",
        "ENV_FILE",
        "WECHAT_APP_ID",
        "WECHAT_ACCOUNT_APP_ID",
        "WECHAT_WEBSITE_APP_ID",
        "WECHAT_CONTENT_CHECK",
        "WECHAT_CONCURRENCY",
        "TRUST_WXCLOUD_HEADERS",
        "TRUSTED_PROXIES",
        "LOGIN_RATE",
        "APP_LOGIN_RATE",
        "CORS_ORIGINS",
        "HOST",
        "PORT",
        "WEB_CONCURRENCY",
        "WEB_CONNECTIONS",
        "REQUESTS_IN_FLIGHT",
        "DATABASE_CONNECTIONS",
        "REQUEST_SECONDS",
        "HEAD_SECONDS",
        "BODY_SECONDS",
        "DRAIN_SECONDS",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "LOG_LEVEL",
    }


def test_a_long_text_is_cut_and_nothing_secret_is_cut_in_two() -> None:
    for before in range(TEXT_CHARACTERS - 50, TEXT_CHARACTERS + 1):
        shown = scrub("word " * (before // 5) + "w" * (before % 5) + SECRETS["a session token"] + " word" * 10_000)
        assert len(shown) <= TEXT_CHARACTERS + 1
        assert SECRETS["a session token"][:8] not in shown


def test_no_token_in_a_path_or_header_is_logged(app: Flask, log_lines: Lines) -> None:
    token = SECRETS["a session token"]

    @app.get("/mistake/<path:rest>")
    def mistake(rest: str) -> None:
        raise RuntimeError(f"at {rest}")

    bearer = {"Authorization": f"Bearer {token}"}
    client = app.test_client()
    assert client.get(f"/mistake/{token}?token={token}", headers=bearer).status_code == 500
    assert any("stack" in line for line in log_lines())
    assert token not in str(log_lines())


def test_the_person_of_the_tests_looks_personal_to_it() -> None:
    assert not [name for name, value in PERSON.items() if value in scrub(f"this is {value}.")]
