"""The server API where the client's tests do not exercise it: errors, limits and lifetimes."""

from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from dev.wechat_simulator import crypto, tokens
from tests.dev.wechat_simulator.conftest import CREDENTIAL_ERRORS
from tests.harness import WEB_APP_ID, WEB_APP_SECRET

Call = Callable[..., Any]
PHONE, CHECK, SUBSCRIBE = "/wxa/business/getuserphonenumber", "/wxa/msg_sec_check", "/cgi-bin/message/subscribe/send"
CUSTOMER, CODE, LINK = "/cgi-bin/message/custom/send", "/wxa/getwxacodeunlimit", "/wxa/generate_urllink"
POSTED = (PHONE, CHECK, SUBSCRIBE, CUSTOMER, CODE, LINK)
SIGNED = ("/wxa/checksession", "/wxa/resetusersessionkey")
BODIES: dict[str, dict[str, Any]] = {
    CHECK: {"content": "长" * 2500, "version": 2, "scene": 4, "openid": "o-alice"},
    SUBSCRIBE: {
        "touser": "o-alice",
        "template_id": "t-order",
        "page": "pages/order?id=1",
        "data": {"thing1": {"value": "茶"}},
    },
    CUSTOMER: {"touser": "o-alice", "msgtype": "text", "text": {"content": "茶"}},
    CODE: {"scene": "a=!#$&'()*+,/:;=?@-._~" + "9" * 10, "page": "pages/order"},
    LINK: {"path": "/pages/order", "query": "9" * 1024},
}
ALIVE = 87008


def errcode(body: dict[str, Any]) -> int:
    return int(body.get("errcode", 0))


def use(wechat: FlaskClient, token: str) -> int:
    """The errcode of a call that fails for another reason if the token is valid: ALIVE."""
    return errcode(wechat.get(SIGNED[0], query_string={"access_token": token}).get_json())


def signed(login: dict[str, Any]) -> dict[str, str]:
    signature = crypto.session_signature(login["session_key"])
    return {"openid": login["openid"], "signature": signature, "sig_method": "hmac_sha256"}


@pytest.mark.parametrize(
    ("different", "expected"), [*CREDENTIAL_ERRORS, ({"js_code": ""}, 41008), ({"js_code": "unknown"}, 40029)]
)
def test_login_errors(log_in: Call, different: dict[str, Any], expected: int) -> None:
    assert errcode(log_in(**different)) == expected


@pytest.mark.parametrize(
    ("different", "expected"), [*CREDENTIAL_ERRORS, ({"appid": WEB_APP_ID, "secret": WEB_APP_SECRET}, 40013)]
)
def test_stable_token_errors(stable_token: Call, different: dict[str, Any], expected: int) -> None:
    assert errcode(stable_token(**different)) == expected


@pytest.mark.parametrize(
    ("path", "field", "values", "expected"),
    [
        (CHECK, "content", ["", "长" * 2501], 47001),
        (CHECK, "version", [1], 40129),
        (CHECK, "scene", [0, 5], 40129),
        (CHECK, "openid", ["o-nobody"], 61010),
        (SUBSCRIBE, "touser", ["o-nobody"], 40003),
        (SUBSCRIBE, "touser", ["o-bob"], 43101),
        (SUBSCRIBE, "template_id", ["t-unknown"], 40037),
        (SUBSCRIBE, "page", ["/pages/order"], 41030),
        (SUBSCRIBE, "data", [None, {}, {"thing1": "茶"}, {"thing1": {"value": 1}}], 47003),
        (CUSTOMER, "touser", ["o-nobody"], 40003),
        (CUSTOMER, "msgtype", ["voice"], 40008),
        (CUSTOMER, "text", ["茶"], 47001),
        (CODE, "scene", ["", "9" * 33], 40169),
        (CODE, "scene", ["茶"], 40129),
        (CODE, "page", ["/pages/order"], 41030),
        (LINK, "path", ["pages/order?id=1"], 40165),
        (LINK, "query", ["9" * 1025], 40212),
    ],
)
def test_errors_of_a_body(
    post: Call, control: Call, log_in: Call, path: str, field: str, values: list[Any], expected: int
) -> None:
    for openid in ("o-alice", "o-bob"):
        log_in(openid)
    control("subscriptions", openid="o-alice", template_id="t-order")
    assert {errcode(post(path, **{**BODIES[path], field: value})) for value in values} == {expected}
    assert errcode(post(path, **BODIES[path])) == 0


@pytest.mark.parametrize("path", ["/cgi-bin/stable_token", *POSTED])
def test_a_body_that_is_not_a_json_object_is_47001(post: Call, path: str) -> None:
    assert [errcode(post(path, raw=raw)) for raw in (b"", b"{", b"[]", b"\xff")] == [47001] * 4


@pytest.mark.parametrize("path", SIGNED)
def test_session_signatures_and_the_reset_of_the_key(get: Call, log_in: Call, path: str) -> None:
    query = signed(log_in())
    for name, value, expected in (
        ("signature", "0" * 64, 87009),
        ("signature", "签", 87009),
        ("openid", "o-nobody", 87009),
        ("sig_method", "hmac_sha1", 87008),
    ):
        assert errcode(get(path, **{**query, name: value})) == expected
    login = get(path, **query)
    assert errcode(login) == 0
    if path == SIGNED[1]:
        assert [errcode(get(SIGNED[0], **each)) for each in (query, signed(login))] == [87009, 0]


def test_codes_expire_after_five_minutes_and_are_not_interchangeable(post: Call, control: Call, log_in: Call) -> None:
    login_codes = [control("codes")["code"] for _ in range(2)]
    phone_codes = [control("phone_codes")["code"] for _ in range(2)]
    assert errcode(log_in(js_code=phone_codes[0])) == errcode(post(PHONE, code=login_codes[0])) == 40029
    for age, index, expected in ((299, 0, 0), (2, 1, 40029)):
        control("clock", advance=age)
        assert errcode(log_in(js_code=login_codes[index])) == expected
        assert errcode(post(PHONE, code=phone_codes[index], openid="o-anybody")) == expected


@pytest.mark.parametrize(("written", "suggest"), [(rb"\u8fdd\u7981", "pass"), ("C:\\\\u 违禁".encode(), "risky")])
def test_unicode_escapes_pass_the_content_check(post: Call, log_in: Call, written: bytes, suggest: str) -> None:
    log_in()
    raw = b'{"content": "%s", "version": 2, "scene": 2, "openid": "o-alice"}' % written
    assert post(CHECK, raw=raw)["result"]["suggest"] == suggest


@pytest.mark.parametrize(("path", "seconds", "expected"), [(CHECK, 2 * 3600, 61010), (CUSTOMER, 48 * 3600, 45015)])
def test_a_recent_visit_is_required(
    post: Call, control: Call, log_in: Call, path: str, seconds: int, expected: int
) -> None:
    log_in()
    control("clock", advance=seconds - 10)
    assert errcode(post(path, **BODIES[path])) == 0
    control("clock", advance=20)
    assert errcode(post(path, **BODIES[path])) == expected
    log_in()
    assert errcode(post(path, **BODIES[path])) == 0


@pytest.mark.parametrize("path", [*SIGNED, *POSTED])
@pytest.mark.parametrize(("token", "expected"), [("", 41001), ("x" * 99, 40014), ("x" * 512, 40001)])
def test_an_invalid_token_is_rejected_first(wechat: FlaskClient, path: str, token: str, expected: int) -> None:
    response = wechat.open(path, method="GET" if path in SIGNED else "POST", query_string={"access_token": token})
    assert (response.status_code, errcode(response.get_json())) == (200, expected)


def test_a_token_is_the_same_until_five_minutes_before_its_end(
    stable_token: Call, control: Call, wechat: FlaskClient
) -> None:
    old = stable_token()
    assert old.keys() == {"access_token", "expires_in"}
    assert len(old["access_token"]) == 512
    control("clock", advance=6890)
    again = stable_token()
    assert again["access_token"] == old["access_token"]
    assert 300 < again["expires_in"] <= 310
    control("clock", advance=11)
    new = stable_token()
    assert new["expires_in"] == 7200
    assert [use(wechat, each["access_token"]) for each in (old, new)] == [ALIVE, ALIVE]
    control("clock", advance=300)
    assert [use(wechat, each["access_token"]) for each in (old, new)] == [42001, ALIVE]


def test_forced_refreshes_are_thirty_seconds_apart_and_twenty_a_day(
    stable_token: Call, control: Call, wechat: FlaskClient
) -> None:
    control("clock", advance=86400 - control("clock", advance=0)["now"] % 86400)  # 8 o'clock in Beijing
    old = stable_token()["access_token"]
    current = stable_token(force_refresh=True)["access_token"]
    assert [use(wechat, token) for token in (old, current)] == [40001, ALIVE]
    assert errcode(stable_token(force_refresh=True)) == 45011
    now = control("clock", advance=0)["now"]
    listed = wechat.get("/simulator/access_tokens").get_json()
    assert listed == {"forced": 2, "uses": [[pytest.approx(now, abs=60)], [pytest.approx(now, abs=60)]]}
    for _ in range(19):
        control("clock", advance=30)
        assert errcode(stable_token(force_refresh=True)) == 0
    control("clock", advance=30)
    assert errcode(stable_token(force_refresh=True)) == 45009
    assert use(wechat, stable_token()["access_token"]) == ALIVE
    control("clock", advance=86400)
    assert errcode(stable_token(force_refresh=True)) == 0


def test_token_calls_are_limited_per_minute_and_day(
    stable_token: Call, control: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (tokens.CALLS_A_MINUTE, tokens.CALLS_A_DAY) == (10_000, 500_000)
    monkeypatch.setattr(tokens, "CALLS_A_MINUTE", 2)
    monkeypatch.setattr(tokens, "CALLS_A_DAY", 3)
    control("clock", advance=86400 - control("clock", advance=0)["now"] % 86400)
    assert [errcode(stable_token()) for _ in range(3)] == [0, 0, 45011]
    control("clock", advance=60)
    assert [errcode(stable_token()) for _ in range(2)] == [0, 45009]
    control("clock", advance=86400)
    assert errcode(stable_token()) == 0


def test_a_reset_forgets_the_clock_the_tokens_and_the_rest(
    wechat: FlaskClient, control: Call, post: Call, log_in: Call
) -> None:
    before = control("clock", advance=0)["now"]
    log_in()
    post(CUSTOMER, **BODIES[CUSTOMER])
    control("clock", advance=3600)
    wechat.delete("/simulator")
    assert control("clock", advance=0)["now"] == pytest.approx(before, abs=60)
    assert wechat.get("/simulator/calls").get_json() == {"calls": []}
    assert wechat.get("/simulator/access_token").get_json() == {"access_token": None, "expires_in": None}
    assert wechat.get("/simulator/customer_messages").get_json() == {"messages": []}
    assert errcode(post(CUSTOMER, **BODIES[CUSTOMER])) == 40003


@pytest.mark.parametrize(
    ("name", "bodies", "status"),
    [
        ("codes", ['{"openid": "o-alice"}'], 200),  # curl labels it as a form
        ("codes", ["[]"], 400),
        ("subscriptions", ['{"openid": "o-alice"}'], 400),
        ("faults", ["{}", '{"path": "/sns/jscode2session", "kind": "odd"}', '{"path": "/odd", "kind": "slow"}'], 400),
        ("user_data", ['{"openid": "o-nobody", "data": {}}'], 404),
        ("push", ["{}", '{"url": "http://x", "format": "yaml"}', '{"url": "http://x", "mode": "odd"}'], 400),
    ],
)
def test_invalid_control_requests(wechat: FlaskClient, name: str, bodies: list[str], status: int) -> None:
    for body in bodies:
        response = wechat.post(f"/simulator/{name}", data=body, content_type="application/x-www-form-urlencoded")
        assert response.status_code == status
        assert ("error" in response.get_json()) == (status != 200)
