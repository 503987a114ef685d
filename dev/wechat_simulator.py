"""A stand-in for WeChat's server API that speaks its wire format: `python -m dev.wechat_simulator --port 8001`.

Written from WeChat's documentation, not from our client, so that the two check each other. What the phone does,
and what goes wrong, is put in by `/simulator/…`:

    POST /simulator/codes   {"openid"?, "unionid"?, "expires_in"?}  -> {"code"}: what wx.login gives the phone
    POST /simulator/faults  {"path", "kind", "times"?, "seconds"?, "errcode"?}: the next calls of a path go wrong
    GET  /simulator/calls   -> {"calls": [{"path", "parameters": [names]}]}: what was called, without the values
    GET  /simulator/session_keys/OPENID  -> {"session_key"}: the one that counts now
    DELETE /simulator       forgets all of it
"""

import argparse
import base64
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, json, request
from werkzeug.serving import WSGIRequestHandler, make_server

CODE_SECONDS = 300
FAULTS = ("slow", "trickle", "errcode", "http_500", "not_json", "close")
ERRMSG = {
    -1: "system error",
    40002: "invalid grant_type",
    40013: "invalid appid",
    40029: "invalid code",
    40125: "invalid appsecret",
    40163: "code been used",
    40226: "code blocked",
    41002: "appid missing",
    41004: "appsecret missing",
    41008: "missing code",
    45009: "reach max api daily quota limit",
    45011: "api minute-quota reach limit  mustslower  retry next minute",
    48001: "api unauthorized",
}


@dataclass
class LoginCode:
    """What a code of wx.login stands for, until it is used or too old."""

    openid: str
    unionid: str | None
    expires_at: float
    used: bool = False


@dataclass
class Fault:
    """What is to go wrong, and how many more times."""

    kind: str
    times: int
    seconds: float
    errcode: int


@dataclass
class State:
    """All that the simulator knows, in memory."""

    codes: dict[str, LoginCode] = field(default_factory=dict)
    session_keys: dict[str, str] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)


def create_simulator(app_id: str, app_secret: str) -> Flask:
    """Make the simulator's WSGI application, for one mini-program.

    :param app_id: any other is answered with 40013.
    :param app_secret: any other is answered with 40125.
    """
    app = Flask("wechat_simulator", static_folder=None)
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    state = State()
    lock = threading.Lock()

    @app.before_request
    def record_and_spoil() -> Response | None:
        if request.path.startswith("/simulator"):
            return None
        with lock:
            state.calls.append({"path": request.path, "parameters": sorted(request.args)})
            fault = state.faults.get(request.path)
            if fault is None:
                return None
            fault.times -= 1
            if fault.times <= 0:
                del state.faults[request.path]
        return _spoil(fault)

    @app.get("/sns/jscode2session")
    def jscode2session() -> Response:
        given = request.args
        for name, missing in {"appid": 41002, "secret": 41004, "js_code": 41008}.items():
            if not given.get(name):
                return _error(missing)
        if given.get("grant_type") != "authorization_code":
            return _error(40002)
        if given["appid"] != app_id:
            return _error(40013)
        if given["secret"] != app_secret:
            return _error(40125)
        with lock:
            code = state.codes.get(given["js_code"])
            if code is None or code.expires_at <= time.time():
                return _error(40029)
            if code.used:
                return _error(40163)
            code.used = True
            session_key = base64.b64encode(secrets.token_bytes(16)).decode()
            state.session_keys[code.openid] = session_key  # the new one replaces the old
            answer: dict[str, Any] = {"session_key": session_key, "openid": code.openid}
            if code.unionid:
                answer["unionid"] = code.unionid
            if len(state.calls) % 2:  # WeChat says success either way
                answer.update(errcode=0, errmsg="ok")
        return _plain_text(answer)

    @app.post("/simulator/codes")
    def make_code() -> dict[str, str]:
        wanted = json.loads(request.get_data() or "{}")  # whatever the content type: curl says it is a form
        code = "0" + secrets.token_hex(15) + "w"
        with lock:
            state.codes[code] = LoginCode(
                openid=wanted.get("openid") or "o" + secrets.token_urlsafe(20)[:27],
                unionid=wanted.get("unionid"),
                expires_at=time.time() + wanted.get("expires_in", CODE_SECONDS),
            )
        return {"code": code}

    @app.post("/simulator/faults")
    def make_fault() -> tuple[dict[str, str], int]:
        wanted = json.loads(request.get_data() or "{}")
        paths = [rule.rule for rule in app.url_map.iter_rules() if not rule.rule.startswith("/simulator")]
        if wanted.get("kind") not in FAULTS or wanted.get("path") not in paths:
            return {"error": f"kind must be one of {', '.join(FAULTS)}, and path of {', '.join(paths)}"}, 400
        with lock:
            state.faults[wanted["path"]] = Fault(
                kind=wanted["kind"],
                times=wanted.get("times", 1),
                seconds=wanted.get("seconds", 10),
                errcode=wanted.get("errcode", -1),
            )
        return {}, 201

    @app.get("/simulator/calls")
    def list_calls() -> dict[str, Any]:
        with lock:
            return {"calls": list(state.calls)}

    @app.get("/simulator/session_keys/<openid>")
    def get_session_key(openid: str) -> dict[str, str | None]:
        with lock:
            return {"session_key": state.session_keys.get(openid)}

    @app.delete("/simulator")
    def forget() -> dict[str, str]:
        with lock:
            vars(state).update(vars(State()))
        return {}

    return app


def _spoil(fault: Fault) -> Response | None:
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return None
    if fault.kind == "trickle":
        return Response(_trickle(fault.seconds), content_type="text/plain")
    if fault.kind == "errcode":
        return _error(fault.errcode)
    if fault.kind == "http_500":
        return Response("<html><body>Internal Server Error</body></html>", 500, content_type="text/html")
    if fault.kind == "not_json":
        return Response("<html>此页面暂时无法访问</html>", content_type="text/html; charset=utf-8")
    request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return Response()  # to nobody


def _trickle(seconds: float) -> Iterator[bytes]:
    """An answer that never stops for long and takes its time all the same."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield b" "
        time.sleep(0.1)


def _error(errcode: int) -> Response:
    """WeChat's way to fail: HTTP 200, with a request id for its support in errmsg."""
    rid = f"{int(time.time()):08x}-{secrets.token_hex(4)}-{secrets.token_hex(4)}"
    return _plain_text({"errcode": errcode, "errmsg": f"{ERRMSG.get(errcode, 'unknown error')}, rid: {rid}"})


def _plain_text(answer: dict[str, Any]) -> Response:
    """JSON that says it is text, as sns/* answers."""
    return Response(json.dumps(answer), content_type="text/plain")


class QuietHandler(WSGIRequestHandler):
    """Writes no access log: its lines would hold the app secret."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="WeChat's server API for one mini-program, on 127.0.0.1.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="the TCP port to listen on")
    where.add_argument("--fd", type=int, help="a socket that listens already")
    parser.add_argument("--app-id", required=True)
    parser.add_argument("--app-secret", required=True)
    options = parser.parse_args()
    server = make_server(
        "127.0.0.1",
        options.port or 0,
        create_simulator(options.app_id, options.app_secret),
        threaded=True,
        request_handler=QuietHandler,
        fd=options.fd,
    )
    server.serve_forever()


if __name__ == "__main__":
    main()
