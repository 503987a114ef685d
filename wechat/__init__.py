"""Everything that speaks WeChat's protocols; knows no HTTP route or table of the service."""

from typing import cast

from flask import Flask, current_app
from werkzeug.local import LocalProxy

from errors import Code
from wechat.access_token import AccessToken
from wechat.client import Client
from wechat.message_push import MessagePush
from wechat.oauth import QR_CODE_SCOPE, SCOPES, WebApp
from wechat.transport import Transport

FAILS = (Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UNAVAILABLE, Code.UPSTREAM_TIMEOUT)
"""The codes with which any call to WeChat can fail."""

api = cast(Client, LocalProxy(lambda: current_app.extensions["wechat"]))
"""WeChat's server API, as the configured mini-program."""
web_apps = cast(dict[str, WebApp], LocalProxy(lambda: current_app.extensions["web_apps"]))
"""By the scope that each of them uses, one of `oauth.SCOPES`."""
push = cast(MessagePush, LocalProxy(lambda: current_app.extensions["push"]))
"""The message push of the mini-program."""


def init_app(app: Flask) -> None:
    app_id, app_secret = app.config["WECHAT_APP_ID"], app.config["WECHAT_APP_SECRET"]
    transport = Transport(app.config["WECHAT_API_BASE_URL"], app.config["WECHAT_CONCURRENCY"], app.extensions["door"])
    access_token = AccessToken(transport, app.extensions["redis"], app.extensions["cipher"], app_id, app_secret)

    def web_app_from_settings(name: str) -> WebApp:
        own_id, own_secret = app.config[f"{name}_APP_ID"] or app_id, app.config[f"{name}_APP_SECRET"] or app_secret
        return WebApp(transport, own_id, own_secret, app.config["WECHAT_OPEN_BASE_URL"])

    account, website = web_app_from_settings("WECHAT_ACCOUNT"), web_app_from_settings("WECHAT_WEBSITE")
    app.extensions["wechat"] = Client(transport, access_token, app_id, app_secret)
    app.extensions["web_apps"] = {scope: website if scope == QR_CODE_SCOPE else account for scope in SCOPES}
    app.extensions["push"] = MessagePush(app.config["WECHAT_PUSH_TOKEN"], app.config["WECHAT_PUSH_AES_KEY"], app_id)
