"""A stand-in for WeChat's servers that speaks their wire format: `python -m dev.wechat_simulator --port 8001 …`.

Written from WeChat's documentation, not from our client, so that the two check each other. What the phone does,
and what goes wrong, is put in by `/simulator/…`; bodies are JSON, whatever the content type. The content check calls
违禁 risky and 可疑 worth a review.

What the person does, in the mini-program and in the browser:

    POST /simulator/codes        {"openid"?, "unionid"?, "expires_in"?}  -> {"code", "openid"}: what wx.login gives the
                                 phone, and who holds it
    POST /simulator/phone_codes  {"openid"?, "phone"?, "country_code"?, "expires_in"?}  -> {"code"}: what the
                                 getPhoneNumber button gives; without an openid it belongs to anybody
    POST /simulator/user_data    {"openid", "data", "age"?, "app_id"?}  -> {"encryptedData", "iv", "rawData",
                                 "signature"}: what wx.getUserInfo gives the page, made "age" seconds ago
    POST /simulator/subscriptions  {"openid", "template_id", "times"?}: accepts messages of a template, which WeChat
                                 knows from then on, also if times is 0
    POST /simulator/web_user     {"openid"?, "unionid"?, "nickname"?, "avatar_url"?, "snapshot"?}  -> {"openid",
                                 "unionid"}: sits down in front of the browser; the openid is that in the first web
                                 app (without any: in the mini-program). Until then each visit is somebody else's

What WeChat does:

    POST /simulator/push         {"message", "url"?, "format"?: "json" or "xml", "mode"?: "safe" or "plain",
                                 "timestamp"?, "nonce"?, "app_id"?, "signature"?, "attempts"?}
                                 -> {"answers": [{"status", "seconds", "body", "reply"}]}: pushes a message to the
                                 service, up to three times until it says 200. Without a status there was no answer;
                                 the reply is that of safe mode, decrypted and verified. A signature given replaces
                                 the one that counts: msg_signature in safe mode
    POST /simulator/push/verify  {"url"?, "timestamp"?, "nonce"?, "signature"?}  -> {"verified", "status", "body"}
    POST /simulator/faults       {"path", "kind", "times"?, "seconds"?, "errcode"?}: the next calls of a path go wrong;
                                 kind is slow, trickle, errcode, http_500, not_json or close
    POST /simulator/clock        {"advance": seconds}  -> {"now"}: WeChat's clock goes ahead
    DELETE /simulator/access_token  lets the access tokens die, as if somebody else had refreshed them by force
    DELETE /simulator            forgets all of it

What came of it:

    GET /simulator/calls                 -> {"calls": [{"path", "parameters": [names], "headers": [names]}]}: what was
                                         called, without the values
    GET /simulator/secrets               -> {"secrets"}: all of it that nobody may find in a log
    GET /simulator/session_keys/OPENID   -> {"session_key"}: the one that counts now
    GET /simulator/access_token          -> {"access_token", "expires_in"}: the newest one, or nulls
    GET /simulator/subscribe_messages    -> {"messages"}: the subscribe messages as they were sent
    GET /simulator/customer_messages     -> {"messages"}: the customer service messages as they were sent
"""

from collections.abc import Mapping

from flask import Flask, Response, request

from dev.wechat_simulator.control import control
from dev.wechat_simulator.faults import spoil
from dev.wechat_simulator.push import PushSettings, message_push
from dev.wechat_simulator.server_api import server_api
from dev.wechat_simulator.web_login import web_login
from dev.wechat_simulator.wire import BadWish, Refused, refusal
from dev.wechat_simulator.world import World

__all__ = ["PushSettings", "create_simulator"]


def create_simulator(
    app_id: str, app_secret: str, web_apps: Mapping[str, str] | None = None, push: PushSettings | None = None
) -> Flask:
    """Make the simulator's WSGI application, for one mini-program.

    :param app_id: any other is answered with 40013.
    :param app_secret: any other is answered with 40125.
    :param web_apps: the secret of each further app that the web login knows.
    :param push: what the message push needs; without it, nothing can be pushed.
    """
    app = Flask("wechat_simulator", static_folder=None)
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    world = World(app_id, app_secret, web_apps or {})

    @app.before_request
    def record_and_spoil() -> Response | None:
        if request.path.startswith("/simulator"):
            return None
        request.get_data()  # a body left unread would end the connection before the answer is out
        with world.lock:
            names = {"parameters": sorted(request.args), "headers": sorted(request.headers.keys())}
            world.memory.calls.append({"path": request.path, **names})
            fault = world.memory.faults.get(request.path)
            if fault is None:
                return None
            fault.times -= 1
            if fault.times <= 0:
                del world.memory.faults[request.path]
        return spoil(fault)

    app.register_error_handler(Refused, refusal)
    app.register_error_handler(BadWish, lambda error: ({"error": str(error)}, 400))
    app.register_blueprint(server_api(world))
    app.register_blueprint(web_login(world))
    app.register_blueprint(message_push(world, push or PushSettings()))
    app.register_blueprint(control(world))
    return app
