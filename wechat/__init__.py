"""Everything that speaks WeChat's protocols; knows no HTTP route or table of the service."""

from typing import NamedTuple, cast

from flask import Flask, current_app
from werkzeug.local import LocalProxy

from errors import ApiError, Code, Message
from wechat.access_token import AccessToken
from wechat.client import Client
from wechat.message_push import MessagePush
from wechat.oauth import QR_CODE_SCOPE, SCOPES, WebApp
from wechat.transport import Transport

FAILS = (Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UNAVAILABLE, Code.UPSTREAM_TIMEOUT)
"""The codes with which any call to WeChat can fail."""
PUSH_NOT_CONFIGURED = Message("未配置消息推送", "Message push is not configured")


class WeChat(NamedTuple):
    """The application's connections to WeChat."""

    client: Client
    web_apps: dict[str, WebApp]
    push: MessagePush | None
    transport: Transport


_wechat = cast(WeChat, LocalProxy(lambda: current_app.extensions["wechat"]))
api = cast(Client, LocalProxy(lambda: _wechat.client))
"""WeChat's server API, as the configured mini-program."""


def web_app(scope: str) -> WebApp:
    """The web app that uses this scope, one of `oauth.SCOPES`."""
    return _wechat.web_apps[scope]


def web_app_of(app_id: str) -> WebApp | None:
    """The web app with this app id; None if it is not configured, or no longer."""
    return next((app for app in _wechat.web_apps.values() if app.app_id == app_id), None)


def is_failing() -> bool:
    """Whether this process pauses the calls of an interface of WeChat, as they kept failing."""
    return _wechat.transport.is_failing


def configured_push() -> MessagePush:
    """The account's message push.

    :raises ApiError: NOT_FOUND if it is not configured.
    """
    if _wechat.push is None:
        raise ApiError(Code.NOT_FOUND, message=PUSH_NOT_CONFIGURED)
    return _wechat.push


def init_app(app: Flask) -> None:
    config = app.config
    app_id, app_secret = config["WECHAT_APP_ID"], config["WECHAT_APP_SECRET"]
    transport = Transport(config["WECHAT_API_BASE_URL"], config["WECHAT_CONCURRENCY"], app.extensions["door"])
    access_token = AccessToken(transport, app.extensions["redis"], app.extensions["cipher"], app_id, app_secret)

    def web_app_from_settings(name: str) -> WebApp:
        own_id, own_secret = config[f"{name}_APP_ID"] or app_id, config[f"{name}_APP_SECRET"] or app_secret
        return WebApp(transport, own_id, own_secret, config["WECHAT_OPEN_BASE_URL"])

    account, website = web_app_from_settings("WECHAT_ACCOUNT"), web_app_from_settings("WECHAT_WEBSITE")
    push_token, push_aes_key = config["WECHAT_PUSH_TOKEN"], config["WECHAT_PUSH_AES_KEY"] or None
    app.extensions["wechat"] = WeChat(
        client=Client(transport, access_token, app_id, app_secret),
        web_apps={scope: website if scope == QR_CODE_SCOPE else account for scope in SCOPES},
        push=MessagePush(push_token, push_aes_key, app_id) if push_token else None,
        transport=transport,
    )
