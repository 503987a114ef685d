import contextlib
import json
import logging
import re
import socket
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug import Request, Response

from errors import ApiError, Code
from telemetry import metrics
from tests.harness import APP_ID, APP_SECRET, Simulator, counted
from tests.wechat.harness import outcome, server, transport_to
from wechat import transport as wechat_transport
from wechat.transport import Transport, unexpected_response

PATH = "/sns/jscode2session"


@pytest.fixture
def transport(simulator: Simulator) -> Iterator[Transport]:
    transport = transport_to(simulator.url)
    yield transport
    transport._adapter.close()


def redeem(transport: Transport, code: str) -> dict[str, Any]:
    return transport.call(
        PATH, {"appid": APP_ID, "secret": APP_SECRET, "js_code": code, "grant_type": "authorization_code"}
    )


def failure(transport: Transport, code: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        redeem(transport, code)
    return caught.value


def test_success_with_errcode_0_and_without_errcode(transport: Transport, simulator: Simulator) -> None:
    for _ in range(4):  # the simulator says it either way in turn
        answer = redeem(transport, simulator.code(openid="o-alice"))
        assert answer["openid"] == "o-alice"
        assert answer.get("errcode", 0) == 0


def test_an_expected_errcode_is_not_a_failure(
    transport: Transport, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    assert (
        transport.call(PATH, {"appid": "wx-other", "secret": "x", "js_code": "x"}, expected={40002})["errcode"] == 40002
    )
    assert not [record for record in caplog.records if record.name == "wechat.transport"]


def test_a_body_is_posted_as_json_in_raw_utf_8() -> None:
    with server(lambda request: Response(json.dumps({"raw": request.get_data().decode()}))) as url:
        echo = transport_to(url)
        assert echo.call("/echo", {}, {"content": "你好"})["raw"] == '{"content": "你好"}'
        echo._adapter.close()


def test_a_call_that_is_not_idempotent_is_not_retried(transport: Transport, simulator: Simulator) -> None:
    simulator.fault("close", times=2)
    with pytest.raises(ApiError) as caught:
        transport.call(PATH, {}, idempotent=False)
    assert caught.value.api_code is Code.UNAVAILABLE
    assert len(simulator.calls()) == 1


@pytest.mark.parametrize(
    ("errcode", "code", "level"),
    [
        *((errcode, Code.UNAVAILABLE, logging.WARNING) for errcode in (-1, 44990, 45009, 45011)),
        *(
            (errcode, Code.WECHAT_CODE_INVALID, logging.INFO)
            for errcode in (40029, 40030, 41008, 42002, 42003, 42007, 61023)
        ),
        (40163, Code.WECHAT_CODE_USED, logging.INFO),
        (40226, Code.WECHAT_HIGH_RISK_USER, logging.INFO),
        *((errcode, Code.CONTENT_REFUSED, logging.INFO) for errcode in (45168, 87014)),
        *((errcode, Code.CONFLICT, logging.INFO) for errcode in (43101, 45015, 45047)),
        *((errcode, Code.WECHAT_REFUSED, logging.ERROR) for errcode in (40001, 40013, 40014, 40125, 40164, 40243)),
        *((errcode, Code.WECHAT_REFUSED, logging.ERROR) for errcode in (41002, 41004, 42001, 48001, 48004, 50001)),
        *((errcode, Code.WECHAT_REFUSED, logging.ERROR) for errcode in (50002, 61004, 61024, 89503, 89506, 89507)),
        *((errcode, Code.INTERNAL_ERROR, logging.ERROR) for errcode in (40002, 40003, 40037, 40066, 41001, 43104)),
        *((errcode, Code.INTERNAL_ERROR, logging.ERROR) for errcode in (40129, 41030, 44002, 47001, 47003, 87009)),
        (99999, Code.UPSTREAM_INVALID, logging.ERROR),
    ],
)
def test_each_errcode_has_its_code_and_log_level(
    transport: Transport,
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
    errcode: int,
    code: Code,
    level: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    simulator.fault("errcode", times=2, errcode=errcode)
    assert failure(transport, simulator.code()).api_code is code
    assert [record.levelno for record in caplog.records if record.name == "wechat.transport"] == [level]


@pytest.mark.parametrize(
    ("fault", "code", "errcode", "outcome", "tries"),
    [
        ({}, None, "0", "ok", 1),
        ({"kind": "errcode", "errcode": 40163}, Code.WECHAT_CODE_USED, "40163", "caller", 1),
        ({"kind": "errcode", "errcode": 40226}, Code.WECHAT_HIGH_RISK_USER, "40226", "caller", 1),
        ({"kind": "errcode", "errcode": 87014}, Code.CONTENT_REFUSED, "87014", "caller", 1),
        ({"kind": "errcode", "errcode": -1}, Code.UNAVAILABLE, "-1", "failure", 2),
        ({"kind": "errcode", "errcode": 40125}, Code.WECHAT_REFUSED, "40125", "failure", 1),
        ({"kind": "close"}, Code.UNAVAILABLE, "unreachable", "failure", 2),
        ({"kind": "http_500"}, Code.UPSTREAM_INVALID, "invalid", "failure", 1),
        ({"kind": "not_json"}, Code.UPSTREAM_INVALID, "invalid", "failure", 1),
        ({"kind": "slow"}, Code.UPSTREAM_TIMEOUT, "timeout", "failure", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_try_is_counted_by_its_outcome_and_measured(
    transport: Transport,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any],
    code: Code | None,
    errcode: str,
    outcome: str,
    tries: int,
) -> None:
    def counts() -> tuple[float, float]:
        return (
            counted("wechat_calls_total", interface=PATH, errcode=errcode, outcome=outcome),
            counted("wechat_call_duration_seconds_count", interface=PATH),
        )

    monkeypatch.setattr(wechat_transport, "ANSWER_SECONDS", 1)
    before = counts()
    if code is None:
        redeem(transport, simulator.code())
    else:
        simulator.fault(**fault, times=3, seconds=2)
        assert failure(transport, simulator.code()).api_code is code
    assert len(simulator.calls()) == tries
    assert counts() == (before[0] + tries, before[1] + tries)


def test_the_series_of_breakdowns_start_at_0(transport: Transport, simulator: Simulator) -> None:
    metrics.WECHAT_CALLS.clear()
    redeem(transport, simulator.code())
    for errcode in ("timeout", "unreachable", "invalid", "-1"):
        labels = {"interface": PATH, "errcode": errcode, "outcome": "failure"}
        assert metrics.REGISTRY.get_sample_value("kuaishang_wechat_calls_total", labels) == 0


def test_an_endless_response_is_not_read_to_its_end(
    transport: Transport, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wechat_transport, "MAXIMUM_ANSWER_BYTES", 3)
    simulator.fault("trickle", seconds=60)
    assert failure(transport, simulator.code()).api_code is Code.UPSTREAM_INVALID


def test_an_image_that_is_too_long_is_not_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(lambda _: Response(b"11 bytes...", content_type="image/png")) as url:
        transport = transport_to(url)
        for limit, expected in ((11, b"11 bytes..."), (10, Code.UPSTREAM_INVALID)):
            monkeypatch.setattr(wechat_transport, "MAXIMUM_ANSWER_BYTES", limit)
            assert outcome(transport.call, "/", {}, media=True) == expected
        transport._adapter.close()


@pytest.mark.parametrize(
    ("stalls", "code", "errcode"), [(False, Code.UPSTREAM_INVALID, "invalid"), (True, Code.UPSTREAM_TIMEOUT, "timeout")]
)
def test_a_response_that_is_cut_short_or_stalls_is_not_retried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stalls: bool, code: Code, errcode: str
) -> None:
    monkeypatch.setattr(wechat_transport, "ANSWER_SECONDS", 0.3 if stalls else 5)
    before = counted("wechat_calls_total", interface=PATH, errcode=errcode, outcome="failure")
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        failed = threading.Event()

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                if stalls:
                    failed.wait(5)

        answered = pool.submit(answer)
        transport = transport_to(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert failure(transport, "0secretcode").api_code is code
        failed.set()
        answered.result(5)
        transport._adapter.close()
    assert counted("wechat_calls_total", interface=PATH, errcode=errcode, outcome="failure") == before + 1
    assert "0secretcode" not in str([vars(record) for record in caplog.records])


def test_redirects_and_cookies_are_ignored() -> None:
    seen = []

    def elsewhere(request: Request) -> Response:
        seen.append((request.path, dict(request.cookies)))
        return Response(status=302, headers={"Location": "/elsewhere", "Set-Cookie": "tracked=yes; Path=/"})

    with server(elsewhere) as url:
        transport = transport_to(url)
        assert [failure(transport, "0code").api_code for _ in range(2)] == [Code.UPSTREAM_INVALID] * 2
        transport._adapter.close()
    assert seen == [(PATH, {})] * 2


def test_a_broken_header_is_not_logged_with_the_url(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            connection = listener.accept()[0]
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nno header at all\r\nContent-Length: 2\r\n\r\n{}")

        answered = pool.submit(answer)
        transport = transport_to(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with contextlib.suppress(ApiError):
            redeem(transport, "0secretcode")
        answered.result(5)
        transport._adapter.close()
    assert APP_SECRET not in caplog.text
    assert "0secretcode" not in caplog.text


def test_no_credentials_of_the_machine_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password of-the-machine")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with server(lambda request: Response(json.dumps({"sent": request.headers.get("Authorization")}))) as url:
        transport = transport_to(url)
        assert transport.call("/", {})["sent"] is None
        transport._adapter.close()


@pytest.mark.parametrize("bypass", ["", "wechat.invalid"])
def test_proxies_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch, bypass: str) -> None:
    with server(lambda request: Response(json.dumps({"host": request.host}))) as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("no_proxy", bypass)
        transport = transport_to("http://wechat.invalid")
        if bypass:
            with pytest.raises(ApiError):
                transport.call("/", {})
        else:
            assert transport.call("/", {})["host"] == "wechat.invalid"
        transport._adapter.close()


def test_certificates_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/ssl/ours.pem")
    assert transport_to("https://wechat.invalid")._options["verify"] == "/etc/ssl/ours.pem"


@pytest.mark.parametrize(
    ("content", "nickname"),
    [
        (b'{"nickname": "a\\ud83d \\ud83d\\ude80"}', "a\ufffd 🚀"),
        (b'{"nickname": "a\x14b"}', "a\ufffdb"),
        (b'{"nickname": "\xe5\xbe"}', "\ufffd"),
    ],
)
def test_malformed_text_is_replaced_and_the_log_names_the_field(
    transport: Transport,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
    nickname: str,
) -> None:
    monkeypatch.setattr(transport, "_exchange", lambda *_: (200, "text/plain", content))
    assert transport.call("/sns/userinfo", {})["nickname"] == nickname
    line = vars(caplog.records[-1])
    assert (line["interface"], line["reason"]) == ("/sns/userinfo", "characters replaced")


@pytest.mark.parametrize("kind", ["errcode", "close"])
def test_busy_and_a_lost_connection_are_retried_once(transport: Transport, simulator: Simulator, kind: str) -> None:
    simulator.fault(kind, times=1)
    assert redeem(transport, simulator.code(openid="o-alice"))["openid"] == "o-alice"
    assert len(simulator.calls()) == 2


@pytest.mark.parametrize("fault", ["errcode", "http_500", "not_json", "close", "slow", None])
def test_neither_the_exception_nor_the_log_contains_the_secret_or_the_code(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    monkeypatch.setattr(wechat_transport, "ANSWER_SECONDS", 0.2)
    caplog.set_level(logging.DEBUG)
    code = simulator.code()
    transport = transport_to(simulator.url if fault else "http://127.0.0.1:9")
    if fault:
        simulator.fault(fault, times=2, errcode=40226, seconds=0.5)
    error = failure(transport, code)
    transport._adapter.close()
    (line,) = [record for record in caplog.records if record.name == "wechat.transport"]
    assert vars(line)["interface"] == PATH
    if not fault:
        assert error.api_code is Code.UNAVAILABLE
    everything = "".join(traceback.format_exception(error)) + "".join(str(vars(record)) for record in caplog.records)
    assert APP_SECRET not in everything
    assert code not in everything


def test_errmsg_and_its_request_id_are_logged(client: FlaskClient, simulator: Simulator, log_lines: Any) -> None:
    client.post("/api/v1/auth/wechat", json={"code": simulator.code(expires_in=-1)})
    (line,) = [line for line in log_lines() if line["message"] == "WeChat call failed"]
    assert re.match(r"errcode 40029: invalid code, rid: [0-9a-f-]+", line["reason"])
    assert (line["interface"], line["errcode"], line["level"]) == (PATH, 40029, "INFO")


def test_unexpected_response_logs_field_names_but_no_values(caplog: pytest.LogCaptureFixture) -> None:
    answer = {
        "openid": "o-secret",
        "errcode": 0,
        "errmsg": {"session_key": "k-secret"},
        "o-secret": 1,
        "数据": 1,
        "a.b": 1,
    }
    answer |= {"n" * 41: 1, "n" * 40: 1, **{f"z{number:02}": number for number in range(40)}}
    assert unexpected_response(PATH, "no such thing", answer).api_code is Code.UPSTREAM_INVALID
    names = ["errcode", "errmsg", "n" * 40, "openid", *(f"z{number:02}" for number in range(16))]
    reason = f"no such thing; fields received: {', '.join(names)}"
    assert (vars(caplog.records[-1])["reason"], vars(caplog.records[-1])["interface"]) == (reason, PATH)
    unexpected_response(PATH, "no such thing", {})
    assert vars(caplog.records[-1])["reason"] == "no such thing; fields received: none"
    assert "secret" not in "".join(str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize(
    "body",
    ["[]", "null", '{"errcode": "40029"}', "[" * 100_000, '{"errcode": 1e999}', '{"errcode": NaN}', '{"errcode": 1e5}'],
)
def test_json_of_another_form_is_invalid(transport: Transport, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(transport, "_exchange", lambda *_: (200, "application/json", body.encode()))
    assert failure(transport, "0code").api_code is Code.UPSTREAM_INVALID
