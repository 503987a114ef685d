"""A stand-in for WeChat's servers that speaks their wire format: `python -m dev.wechat_simulator --port 8001 …`.

Written from WeChat's documentation, not from our client, so that the two check each other. `/simulator/…` controls
what users do and which faults occur; bodies are JSON, whatever the content type. The content check rates 违禁 as risky
and 可疑 as worth a review.

Actions of users, in the mini-program and in the browser:

    POST /simulator/codes        {"openid"?, "unionid"?, "expires_in"?}  -> {"code", "openid"}: the result of wx.login,
                                 and the user it belongs to
    POST /simulator/phone_codes  {"openid"?, "phone"?, "country_code"?, "expires_in"?}  -> {"code"}: the result of the
                                 getPhoneNumber button; without an openid any user can use it
    POST /simulator/user_data    {"openid", "data", "age"?, "app_id"?}  -> {"encryptedData", "iv", "rawData",
                                 "signature"}: the result of wx.getUserInfo, "age" seconds ago
    POST /simulator/subscriptions  {"openid", "template_id", "times"?}: subscribes to messages of a template, which
                                 exists from then on, also if times is 0
    POST /simulator/web_user     {"openid"?, "unionid"?, "nickname"?, "avatar_url"?, "snapshot"?}  -> {"openid",
                                 "unionid"}: the user in the browser from now on, with the openid in the first web app
                                 (in the mini-program if there is none). Until then each visit is by a new user

Actions of WeChat:

    POST /simulator/push         {"message", "url"?, "format"?: "json" or "xml", "mode"?: "safe" or "plain",
                                 "timestamp"?, "nonce"?, "app_id"?, "signature"?, "attempts"?}
                                 -> {"answers": [{"status", "seconds", "body", "reply"}]}: pushes a message to the
                                 service, up to three times until it responds with 200. The status is null if there was
                                 no response in time; the reply is the body decrypted and verified, in safe mode. A
                                 signature replaces the one that is checked: msg_signature in safe mode
    POST /simulator/push/verify  {"url"?, "timestamp"?, "nonce"?, "signature"?}  -> {"verified", "status", "body"}
    POST /simulator/faults       {"path", "kind", "times"?, "seconds"?, "errcode"?}: the next calls of a path fail;
                                 kind is slow, trickle, errcode, http_500, not_json or close
    POST /simulator/clock        {"advance": seconds}  -> {"now"}: advances WeChat's clock
    POST /simulator/secret       {"secret"}: resets the mini-program's app secret to this one, as an administrator does
    DELETE /simulator/access_token  invalidates the access tokens, as if another server had forced a refresh
    DELETE /simulator            resets everything

Results:

    GET /simulator/calls                 -> {"calls": [{"path", "parameters": [names], "headers": [names]}]}: the calls,
                                         without values
    GET /simulator/secrets               -> {"secrets"}: every value that must not be in a log
    GET /simulator/session_keys/OPENID   -> {"session_key"}: the current one
    GET /simulator/access_token          -> {"access_token", "expires_in"}: the newest one, or nulls
    GET /simulator/access_tokens         -> {"forced", "uses": [[seconds, seconds]]}: how often one was asked for by
                                         force, also in vain, and when each was used first and last; empty if it was not
    GET /simulator/subscribe_messages    -> {"messages"}: the subscribe messages as they were sent
    GET /simulator/customer_messages     -> {"messages"}: the customer service messages as they were sent
"""

from collections.abc import Mapping

from flask import Flask, Response, request

from dev.wechat_simulator.control import control
from dev.wechat_simulator.faults import apply_fault
from dev.wechat_simulator.push import PushSettings, message_push
from dev.wechat_simulator.server_api import server_api
from dev.wechat_simulator.web_login import web_login
from dev.wechat_simulator.wire import InvalidControlRequest, Refused, error_response
from dev.wechat_simulator.world import World

__all__ = ["PushSettings", "create_simulator"]


def create_simulator(
    app_id: str, app_secret: str, web_apps: Mapping[str, str] | None = None, push: PushSettings | None = None
) -> Flask:
    """Make the simulator's WSGI application, for one mini-program.

    :param app_id: any other gets errcode 40013.
    :param app_secret: any other gets errcode 40125, until it is reset.
    :param web_apps: the app ids and secrets of further apps, for login on the web.
    :param push: the settings of the message push; without them nothing can be pushed.
    """
    app = Flask("wechat_simulator", static_folder=None)
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    world = World(app_id, app_secret, web_apps or {})

    @app.before_request
    def record_call() -> Response | None:
        if request.path.startswith("/simulator"):
            return None
        request.get_data()  # an unread body would end the connection before the response is sent
        with world.lock:
            names = {"parameters": sorted(request.args), "headers": sorted(request.headers.keys())}
            world.memory.calls.append({"path": request.path, **names})
            world.memory.tokens.record_use(request.args.get("access_token", ""), world.now())
            fault = world.memory.faults.get(request.path)
            if fault is None:
                return None
            fault.times -= 1
            if fault.times <= 0:
                del world.memory.faults[request.path]
        return apply_fault(fault)

    app.register_error_handler(Refused, error_response)
    app.register_error_handler(InvalidControlRequest, lambda error: ({"error": str(error)}, 400))
    app.register_blueprint(server_api(world))
    app.register_blueprint(web_login(world))
    app.register_blueprint(message_push(world, push or PushSettings()))
    app.register_blueprint(control(world))
    return app
