"""Everything that speaks WeChat's protocols; knows no HTTP route of ours and no table."""

from typing import cast

from flask import Flask, current_app
from werkzeug.local import LocalProxy

from wechat.client import Client

api = cast(Client, LocalProxy(lambda: current_app.extensions["wechat"]))
"""WeChat's server API, as the configured mini-program."""


def init_app(app: Flask) -> None:
    app.extensions["wechat"] = Client(
        app_id=app.config["WECHAT_APP_ID"],
        app_secret=app.config["WECHAT_APP_SECRET"],
        base_url=app.config["WECHAT_API_BASE_URL"],
        connections=app.config["WEB_THREADS"],
    )
