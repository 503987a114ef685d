"""The simulator in this process, for whatever is no matter of the wire."""

from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from dev.wechat_simulator import PushSettings, create_simulator
from tests.harness import APP_ID, APP_SECRET, PUSH_AES_KEY, PUSH_TOKEN, WEB_APP_ID, WEB_APP_SECRET


@pytest.fixture
def wechat() -> FlaskClient:
    web_apps = {WEB_APP_ID: WEB_APP_SECRET}
    return create_simulator(APP_ID, APP_SECRET, web_apps, PushSettings(PUSH_TOKEN, PUSH_AES_KEY)).test_client()


@pytest.fixture
def control(wechat: FlaskClient) -> Callable[..., Any]:
    """Post to /simulator/…, and answer what it answers."""

    def post(name: str, **wanted: Any) -> Any:
        answer = wechat.post(f"/simulator/{name}", json=wanted)
        assert answer.status_code in (200, 201), answer.text
        return answer.get_json()

    return post


@pytest.fixture
def stable_token(wechat: FlaskClient) -> Callable[..., TestResponse]:
    """Ask for an access token, with a body that differs from the usual as named."""

    def post(**different: Any) -> TestResponse:
        body = {"grant_type": "client_credential", "appid": APP_ID, "secret": APP_SECRET, **different}
        return wechat.post("/cgi-bin/stable_token", json=body)

    return post


@pytest.fixture
def access_token(stable_token: Callable[..., TestResponse]) -> str:
    token: str = stable_token().get_json()["access_token"]
    return token


@pytest.fixture
def log_in(wechat: FlaskClient, control: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Redeem a new code of wx.login; answers the openid and session_key."""

    def redeem(**wanted: Any) -> dict[str, Any]:
        query = {"appid": APP_ID, "secret": APP_SECRET, "grant_type": "authorization_code"}
        query["js_code"] = control("codes", **wanted)["code"]
        answer: dict[str, Any] = wechat.get("/sns/jscode2session", query_string=query).get_json(force=True)
        return answer

    return redeem
