"""Everything that is served, in order: each group of routes, where it is mounted, and who may call it.

`flask.g` holds for one request: `user_id`, who is signed in, `user`, their row (policies, database), and `rate_limit`,
the headers about it (policies); `row`, what the view returned (api); `version_checked`, whether its If-Match was
compared (api); `database_session` and `after_commit` (database).
"""

from functools import partial

from flask import Flask, Response, current_app, request
from flask_cors import CORS

from blueprints import auth, docs, health, messages, orders, personal_data, policies, users, web_login, wechat_profile
from blueprints.api import register
from blueprints.parsing import CONVERTERS, SMALL_BODY
from blueprints.switches import Switches, switch
from errors import ApiError, Code, Message
from storage.message_queue import MessageQueue

V1 = "/api/v1"
ALLOWED = ["Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key", "traceparent"]
ALLOWED += ["X-Request-Timeout"]
EXPOSED = ["ETag", "Location", "RateLimit", "RateLimit-Policy", "Retry-After", "X-Trace-Id"]
"""The headers that pages of CORS_ORIGINS may send and read; no cookies, as they have bearer tokens."""
SWITCHED_OFF = Message("该功能暂时关闭，请稍后再试", "This function is switched off for now: retry later")


def init_app(app: Flask) -> None:
    app.before_request(_answer_before_policies)
    app.after_request(policies.report_rate_limit)
    if origins := app.config["CORS_ORIGINS"]:
        CORS(app, origins=origins, allow_headers=ALLOWED, expose_headers=EXPOSED, always_send=False, max_age=600)
    app.url_map.converters.update(CONVERTERS)
    app.config["MAX_CONTENT_LENGTH"] = SMALL_BODY
    app.register_blueprint(docs.documents)  # for everybody, as is the page
    if app.config["DOCS"]:
        app.register_blueprint(docs.page)
    mount = partial(register, app)
    mount(auth.login, url_prefix=f"{V1}/auth", auth=policies.logins)
    mount(auth.blueprint, url_prefix=f"{V1}/auth", auth=policies.session_holders)
    mount(web_login.blueprint, url_prefix=f"{V1}/auth/wechat", auth=policies.logins)
    mount(users.blueprint, url_prefix=f"{V1}/users", auth=policies.signed_in)
    mount(wechat_profile.blueprint, url_prefix=f"{V1}/users", auth=policies.signed_in)
    mount(personal_data.blueprint, url_prefix=f"{V1}/users", auth=policies.signed_in)
    mount(users.administration, url_prefix=f"{V1}/users", auth=policies.administrators)
    mount(orders.blueprint, url_prefix=f"{V1}/orders", auth=policies.signed_in)
    mount(messages.blueprint, url_prefix=f"{V1}/wechat", auth=policies.public)  # signed by WeChat
    mount(health.blueprint, auth=policies.public)
    mount(health.scraped, auth=policies.scrapers)
    app.extensions["messages"] = MessageQueue(app, messages.handle)  # gunicorn.conf.py starts it

    # Client code in the field calls the login without a version.
    app.add_url_rule("/api/auth/wechat", endpoint="login.log_in", methods=["POST"])

    app.extensions["switches"] = Switches(app)
    app.cli.add_command(switch)


def _answer_before_policies() -> tuple[Response, int] | None:
    if "//" in request.environ["PATH_INFO"]:  # a proxy's rules for paths may see another one than werkzeug
        raise ApiError(Code.NOT_FOUND)
    if request.method == "OPTIONS" and request.url_rule:
        return current_app.make_default_options_response(), 204
    if request.endpoint in current_app.extensions["switches"].off:
        raise ApiError(Code.UNAVAILABLE, message=SWITCHED_OFF)
    return None
