"""The simulator in this process."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from dev.wechat_simulator import PushSettings, create_simulator
from tests.harness import APP_ID, APP_SECRET, PUSH_AES_KEY, PUSH_TOKEN, WEB_APP_ID, WEB_APP_SECRET

# How WeChat reports wrong credentials of an app, whatever they are for.
CREDENTIAL_ERRORS = [
    ({"appid": ""}, 41002),
    ({"secret": ""}, 41004),
    ({"grant_type": "odd"}, 40002),
    ({"appid": "wx-other"}, 40013),
    ({"secret": "other"}, 40125),
]


@pytest.fixture
def wechat() -> FlaskClient:
    web_apps = {WEB_APP_ID: WEB_APP_SECRET}
    return create_simulator(APP_ID, APP_SECRET, web_apps, PushSettings(PUSH_TOKEN, PUSH_AES_KEY)).test_client()


@pytest.fixture
def control(wechat: FlaskClient) -> Callable[..., Any]:
    """Post to /simulator/…, and return the JSON of the response."""

    def post(name: str, **body: Any) -> Any:
        response = wechat.post(f"/simulator/{name}", json=body)
        assert response.status_code in (200, 201), response.text
        return response.get_json()

    return post


@pytest.fixture
def stable_token(wechat: FlaskClient) -> Callable[..., dict[str, Any]]:
    """Ask for an access token, with a body that differs from the usual one."""

    def post(**different: Any) -> dict[str, Any]:
        body = {"grant_type": "client_credential", "appid": APP_ID, "secret": APP_SECRET, **different}
        return read(wechat.post("/cgi-bin/stable_token", json=body))

    return post


@pytest.fixture
def get(wechat: FlaskClient, stable_token: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Call an interface with an access token."""
    return lambda path, **query: read(
        wechat.get(path, query_string={"access_token": stable_token()["access_token"], **query})
    )


@pytest.fixture
def post(wechat: FlaskClient, stable_token: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Post a body to an interface with an access token."""

    def call(path: str, /, raw: bytes | None = None, **body: Any) -> dict[str, Any]:
        data = json.dumps(body, ensure_ascii=False).encode() if raw is None else raw
        return read(wechat.post(path, query_string={"access_token": stable_token()["access_token"]}, data=data))

    return call


@pytest.fixture
def log_in(wechat: FlaskClient, control: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Redeem a new code of wx.login, with a query that differs from the usual one."""

    def redeem(openid: str = "o-alice", **different: Any) -> dict[str, Any]:
        query = {"appid": APP_ID, "secret": APP_SECRET, "grant_type": "authorization_code"}
        query["js_code"] = control("codes", openid=openid)["code"]
        return read(wechat.get("/sns/jscode2session", query_string={**query, **different}))

    return redeem


def read(response: TestResponse) -> dict[str, Any]:
    """Read JSON in WeChat's format; an image as its bytes."""
    assert response.status_code == 200
    if response.content_type == "image/jpeg":
        return {"image": response.data}
    below_sns = response.request.path.startswith("/sns/")
    assert response.content_type == ("text/plain" if below_sns else "application/json; charset=utf-8")
    body: dict[str, Any] = response.get_json(force=True)
    assert not body.get("errcode") or ", rid: " in body["errmsg"]
    return body
