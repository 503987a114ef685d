import logging
import threading
import traceback
from collections.abc import Iterator

import pytest
from werkzeug import Request, Response
from werkzeug.serving import make_server

from errors import ApiError, Code
from tests.harness import APP_ID, APP_SECRET, Simulator
from wechat import client as wechat_client
from wechat.client import Client

PATH = "/sns/jscode2session"


@pytest.fixture
def client(simulator: Simulator) -> Iterator[Client]:
    client = make_client(simulator.url)
    yield client
    client.close()


def make_client(base_url: str, app_id: str = APP_ID, app_secret: str = APP_SECRET) -> Client:
    return Client(app_id=app_id, app_secret=app_secret, base_url=base_url, connections=4)


def failure(client: Client, code: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        client.code_to_session(code)
    return caught.value


def test_a_code_is_worth_an_openid_and_a_session_key(client: Client, simulator: Simulator) -> None:
    session = client.code_to_session(simulator.code(openid="o-alice", unionid="u-alice"))
    assert (session.openid, session.unionid) == ("o-alice", "u-alice")
    assert len(session.session_key) == 24


def test_success_is_seen_with_errcode_0_and_without_errcode(client: Client, simulator: Simulator) -> None:
    for _ in range(4):  # the simulator says it either way in turn
        assert client.code_to_session(simulator.code(openid="o-alice")).unionid is None


def test_login_takes_no_access_token(client: Client, simulator: Simulator) -> None:
    client.code_to_session(simulator.code())
    assert simulator.calls() == [{"path": PATH, "parameters": ["appid", "grant_type", "js_code", "secret"]}]


def test_a_code_that_is_unknown_too_old_or_used_is_told_apart(client: Client, simulator: Simulator) -> None:
    assert failure(client, "0unknown").api_code is Code.WECHAT_CODE_INVALID
    assert failure(client, simulator.code(expires_in=-1)).api_code is Code.WECHAT_CODE_INVALID
    code = simulator.code()
    client.code_to_session(code)
    assert failure(client, code).api_code is Code.WECHAT_CODE_USED


def test_a_wrong_app_id_or_secret_is_for_an_operator(simulator: Simulator) -> None:
    for different in ({"app_id": "wx-other"}, {"app_secret": "other"}):
        client = make_client(simulator.url, **different)
        assert failure(client, simulator.code()).api_code is Code.WECHAT_REFUSED
        client.close()


@pytest.mark.parametrize(
    ("errcode", "code"),
    [
        (-1, Code.UNAVAILABLE),
        (40029, Code.WECHAT_CODE_INVALID),
        (40163, Code.WECHAT_CODE_USED),
        (40226, Code.WECHAT_HIGH_RISK_USER),
        (41002, Code.WECHAT_REFUSED),
        (41004, Code.WECHAT_REFUSED),
        (41008, Code.WECHAT_CODE_INVALID),
        (40013, Code.WECHAT_REFUSED),
        (40125, Code.WECHAT_REFUSED),
        (40164, Code.WECHAT_REFUSED),
        (48001, Code.WECHAT_REFUSED),
        (45009, Code.UNAVAILABLE),
        (45011, Code.UNAVAILABLE),
        (40001, Code.UPSTREAM_INVALID),
        (47001, Code.UPSTREAM_INVALID),
        (99999, Code.UPSTREAM_INVALID),
    ],
)
def test_each_errcode_has_its_code(client: Client, simulator: Simulator, errcode: int, code: Code) -> None:
    simulator.fault("errcode", times=2, errcode=errcode)
    assert failure(client, simulator.code()).api_code is code


@pytest.mark.parametrize(
    ("kind", "code"),
    [("http_500", Code.UPSTREAM_INVALID), ("not_json", Code.UPSTREAM_INVALID), ("close", Code.UNAVAILABLE)],
)
def test_each_way_to_break_has_its_code(client: Client, simulator: Simulator, kind: str, code: Code) -> None:
    simulator.fault(kind, times=2)
    assert failure(client, simulator.code()).api_code is code


def test_an_answer_that_takes_too_long_is_not_waited_for(
    client: Client, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wechat_client, "READ_SECONDS", 0.2)
    simulator.fault("slow", seconds=1)
    assert failure(client, simulator.code()).api_code is Code.UPSTREAM_TIMEOUT
    assert len(simulator.calls()) == 1


def test_an_answer_that_trickles_in_for_too_long_is_not_waited_for(
    client: Client, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wechat_client, "ANSWER_SECONDS", 0.5)
    simulator.fault("trickle", seconds=60)
    assert failure(client, simulator.code()).api_code is Code.UPSTREAM_TIMEOUT
    assert len(simulator.calls()) == 1


def test_an_answer_that_does_not_end_is_not_read_to_its_end(
    client: Client, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wechat_client, "MAXIMUM_ANSWER_BYTES", 3)
    simulator.fault("trickle", seconds=60)
    assert failure(client, simulator.code()).api_code is Code.UPSTREAM_INVALID


def test_no_answer_takes_longer_than_it_says() -> None:
    longest_try = wechat_client.ANSWER_SECONDS + wechat_client.READ_SECONDS
    assert 2 * longest_try + wechat_client.RETRY_PAUSE_SECONDS < wechat_client.PATIENCE_SECONDS


def test_neither_a_redirect_is_followed_nor_a_cookie_kept() -> None:
    seen = []

    @Request.application
    def elsewhere(request: Request) -> Response:
        seen.append((request.path, dict(request.cookies)))
        return Response(status=302, headers={"Location": "/elsewhere", "Set-Cookie": "tracked=yes; Path=/"})

    server = make_server("127.0.0.1", 0, elsewhere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = make_client(f"http://127.0.0.1:{server.server_port}")
    try:
        assert [failure(client, "0code").api_code for _ in range(2)] == [Code.UPSTREAM_INVALID] * 2
    finally:
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()
    assert seen == [(PATH, {})] * 2


def test_nobody_listening_is_unavailable() -> None:
    client = make_client("http://127.0.0.1:9")
    assert failure(client, "0code").api_code is Code.UNAVAILABLE
    client.close()


@pytest.mark.parametrize("kind", ["errcode", "close"])
def test_busy_and_a_lost_connection_are_tried_once_more_and_no_more(
    client: Client, simulator: Simulator, kind: str
) -> None:
    simulator.fault(kind, times=1)
    assert client.code_to_session(simulator.code(openid="o-alice")).openid == "o-alice"
    assert len(simulator.calls()) == 2
    simulator.fault(kind, times=10)
    failure(client, simulator.code())
    assert len(simulator.calls()) == 4


def test_what_cannot_succeed_is_not_tried_again(client: Client, simulator: Simulator) -> None:
    simulator.fault("errcode", times=10, errcode=40226)
    failure(client, simulator.code())
    assert len(simulator.calls()) == 1


@pytest.mark.parametrize("fault", ["errcode", "http_500", "not_json", "close", "slow", None])
def test_a_failure_is_logged_and_neither_it_nor_the_log_holds_the_secret_or_the_code(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    monkeypatch.setattr(wechat_client, "READ_SECONDS", 0.2)
    caplog.set_level(logging.DEBUG)
    code = simulator.code()
    client = make_client(simulator.url if fault else "http://127.0.0.1:9")
    if fault:
        simulator.fault(fault, times=2, errcode=40226, seconds=0.5)
    error = failure(client, code)
    client.close()
    (line,) = [record for record in caplog.records if record.name == "wechat.client"]
    assert vars(line)["interface"] == PATH
    everything = "".join(traceback.format_exception(error)) + "".join(str(vars(record)) for record in caplog.records)
    assert APP_SECRET not in everything
    assert code not in everything


def test_the_request_id_that_wechat_support_asks_for_is_logged(
    client: Client, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    failure(client, "0unknown")
    assert ", rid: " in vars(caplog.records[-1])["reason"]


@pytest.mark.parametrize(
    ("errcode", "level"), [(40125, logging.ERROR), (99999, logging.ERROR), (-1, logging.WARNING), (40029, logging.INFO)]
)
def test_a_failure_is_as_loud_as_it_is_in_need_of_somebody(
    client: Client, simulator: Simulator, caplog: pytest.LogCaptureFixture, errcode: int, level: int
) -> None:
    caplog.set_level(logging.DEBUG)
    simulator.fault("errcode", times=2, errcode=errcode)
    failure(client, simulator.code())
    assert [record.levelno for record in caplog.records if record.name == "wechat.client"] == [level]


@pytest.mark.parametrize(
    "body",
    ["[]", "null", "{}", '{"openid": "o"}', '{"openid": 1, "session_key": "k"}', '{"errcode": "x"}', "[" * 100_000]
    + [
        '{"errcode": 1e999}',
        '{"openid": "\\ud800", "session_key": "k"}',
        '{"openid": "%s", "session_key": "k"}' % ("o" * 65),
    ]
    + ['{"openid": "o", "session_key": "k", "unionid": 5}'],
)
def test_json_that_is_no_answer_is_invalid(client: Client, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(client, "_exchange", lambda *_: (200, body.encode()))
    assert failure(client, "0code").api_code is Code.UPSTREAM_INVALID
