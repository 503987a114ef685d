"""WeChat's wire format: how requests are read and responses written."""

import secrets
import time
from typing import Any

from flask import Response, json, request

ERRMSG = {
    -1: "system error",
    40001: "invalid credential, access_token is invalid or not latest",
    40002: "invalid grant_type",
    40003: "invalid openid",
    40008: "invalid message type",
    40013: "invalid appid",
    40014: "invalid access_token",
    40029: "invalid code",
    40030: "invalid refresh_token",
    40037: "invalid template_id",
    40125: "invalid appsecret",
    40129: "invalid scene",
    40163: "code been used",
    40165: "invalid weapp pagepath",
    40169: "invalid length for scene, or the data is not json string",
    40212: "invalid query",
    40226: "code blocked",
    41001: "access_token missing",
    41002: "appid missing",
    41003: "missing refresh_token",
    41004: "appsecret missing",
    41008: "missing code",
    41009: "missing openid",
    41030: "invalid page",
    42001: "access_token expired",
    42002: "refresh_token expired",
    43101: "user refuse to accept the msg",
    45009: "reach max api daily quota limit",
    45011: "api minute-quota reach limit  mustslower  retry next minute",
    45015: "response out of time limit or subscription is canceled",
    47001: "data format error",
    47003: "argument invalid!",
    48001: "api unauthorized",
    61010: "user has not visited recently",
    87008: "invalid sig_method",
    87009: "invalid signature",
}
OK = {"errcode": 0, "errmsg": "ok"}
UNKNOWN_CODE = (
    "invalid code, as this is the WeChat simulator, which knows only its own codes; "
    "for codes of DevTools or a phone set WECHAT_APP_ID and WECHAT_APP_SECRET to those of a real account"
)
"""Instead of WeChat's errmsg. The service logs it."""


class Refused(Exception):
    """WeChat responds with an errcode.

    :param errmsg: WeChat's by default.
    """

    def __init__(self, errcode: int, errmsg: str = "") -> None:
        super().__init__(errcode)
        self.errcode = errcode
        self.errmsg = errmsg or ERRMSG.get(errcode, "unknown error")


def answer(body: dict[str, Any]) -> Response:
    """JSON, which is labelled as text below sns/."""
    if request.path.startswith("/sns/"):
        return Response(json.dumps(body), content_type="text/plain")
    return Response(json.dumps(body), content_type="application/json; charset=utf-8")


def error_response(refused: Refused) -> Response:
    """An error in WeChat's format: HTTP 200, with a request id for its support in errmsg."""
    rid = f"{int(time.time()):08x}-{secrets.token_hex(4)}-{secrets.token_hex(4)}"
    return answer({"errcode": refused.errcode, "errmsg": f"{refused.errmsg}, rid: {rid}"})


def require(**errcode_if_missing: int) -> None:
    """Check that the query contains these parameters."""
    for name, errcode in errcode_if_missing.items():
        if not request.args.get(name):
            raise Refused(errcode)


def read_body() -> dict[str, Any]:
    """Read the body of an API call."""
    try:
        body = json.loads(request.get_data())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Refused(47001)
    return body


def text(body: dict[str, Any], name: str) -> str:
    """Read a text from a body; anything but a text counts as missing."""
    value = body.get(name)
    return value if isinstance(value, str) else ""


class InvalidControlRequest(Exception):
    """A request to /simulator is malformed."""


def control_body(*required: str) -> dict[str, Any]:
    """Read the body of a request to /simulator, whatever its content type: curl labels it as a form.

    :param required: the fields that must be present.
    :raises InvalidControlRequest: if it is not a JSON object, or a field is missing.
    """
    try:
        body = json.loads(request.get_data() or "{}")
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InvalidControlRequest("must be a JSON object")
    for name in required:
        if name not in body:
            raise InvalidControlRequest(f"{name} is required")
    return body
