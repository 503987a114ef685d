"""The mini-program's server API: api.weixin.qq.com without OAuth2."""

import hmac
import re
import secrets
from typing import Any

from flask import Blueprint, Response, request

from dev.wechat_simulator import crypto
from dev.wechat_simulator.wire import OK, UNKNOWN_CODE, Refused, answer, read_body, require, text
from dev.wechat_simulator.world import World, new_session_key

VISIT_SECONDS = 2 * 3600
MAXIMUM_CONTENT = 2500
SUGGEST_LABEL = {"risky": 20006, "review": 20012, "pass": 100}
CUSTOMER_MESSAGE_SECONDS = 48 * 3600
CUSTOMER_MESSAGE_TYPES = ("text", "image", "link", "miniprogrampage")
IMAGE = bytes.fromhex(  # a grey JPEG of 8 by 8 pixels: tables of one code each, and two bits of data
    f"ffd8 ffdb004300{'01' * 64} ffc0000b080008000801011100 ffc4001400{'01':0<32}00 ffc4001410{'01':0<32}00"
    "ffda0008010100003f00 3f ffd9"
)
UNICODE_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u")


def server_api(world: World) -> Blueprint:
    """Make the routes of the server API."""
    blueprint = Blueprint("server_api", __name__)

    def check_access_token() -> None:
        with world.lock:
            world.memory.tokens.check(request.args.get("access_token", ""), world.now())

    def check_session_signature() -> str:
        """Check the signature, and return the openid. The caller holds the lock."""
        given = request.args
        openid = given.get("openid", "")
        if given.get("sig_method") != "hmac_sha256":
            raise Refused(87008)
        session_key = world.memory.session_keys.get(openid)
        if session_key is None:
            raise Refused(87009)
        signature = crypto.session_signature(session_key)
        if not hmac.compare_digest(signature.encode(), given.get("signature", "").encode()):
            raise Refused(87009)
        return openid

    @blueprint.get("/sns/jscode2session")
    def jscode2session() -> Response:
        require(appid=41002, secret=41004, js_code=41008)
        given = request.args
        if given.get("grant_type") != "authorization_code":
            raise Refused(40002)
        if given["appid"] != world.app_id:
            raise Refused(40013)
        if given["secret"] != world.secrets[world.app_id]:
            raise Refused(40125)
        with world.lock:
            memory = world.memory
            code = memory.codes.get(given["js_code"])
            if code is None:
                raise Refused(40029, UNKNOWN_CODE)
            if code.expires_at <= world.now():
                raise Refused(40029)
            if code.used:
                raise Refused(40163)
            code.used = True
            session_key = new_session_key()
            memory.session_keys[code.openid] = session_key  # the new one replaces the old
            memory.seen[code.openid] = world.now()
            body: dict[str, Any] = {"session_key": session_key, "openid": code.openid}
            if code.unionid:
                body["unionid"] = code.unionid
            if len(memory.calls) % 2:  # WeChat reports success in either form
                body |= OK
        return answer(body)

    @blueprint.post("/cgi-bin/stable_token")
    def stable_token() -> Response:
        body = read_body()
        for name, missing in {"appid": 41002, "secret": 41004}.items():
            if not text(body, name):
                raise Refused(missing)
        if body.get("grant_type") != "client_credential":
            raise Refused(40002)
        if body["appid"] != world.app_id:
            raise Refused(40013)
        if body["secret"] != world.secrets[world.app_id]:
            raise Refused(40125)
        with world.lock:
            token, seconds = world.memory.tokens.issue(body.get("force_refresh") is True, world.now())
        return answer({"access_token": token, "expires_in": seconds})

    @blueprint.get("/wxa/checksession")
    def checksession() -> Response:
        check_access_token()
        with world.lock:
            check_session_signature()
        return answer(OK)

    @blueprint.get("/wxa/resetusersessionkey")
    def resetusersessionkey() -> Response:
        check_access_token()
        with world.lock:
            openid = check_session_signature()
            session_key = world.memory.session_keys[openid] = new_session_key()
        return answer({**OK, "openid": openid, "session_key": session_key})

    @blueprint.post("/wxa/business/getuserphonenumber")
    def getuserphonenumber() -> Response:
        check_access_token()
        body = read_body()
        code, openid = text(body, "code"), text(body, "openid")
        with world.lock:
            memory = world.memory
            now = world.now()
            found = memory.phone_codes.get(code)
            if found is None:
                raise Refused(40029, UNKNOWN_CODE)
            if found.expires_at <= now:
                raise Refused(40029)
            if openid and found.openid not in (None, openid):
                raise Refused(40003)
            del memory.phone_codes[code]
            memory.phone_answers += 1
            as_number = memory.phone_answers % 2 == 0
        foreign = found.country_code != "86"
        phone_info = {
            "phoneNumber": found.country_code + found.phone if foreign else found.phone,
            "purePhoneNumber": found.phone,
            "countryCode": int(found.country_code) if as_number else found.country_code,
            "watermark": {"timestamp": int(now), "appid": world.app_id},
        }
        return answer({**OK, "phone_info": phone_info})

    @blueprint.post("/wxa/msg_sec_check")
    def msg_sec_check() -> Response:
        check_access_token()
        body = read_body()
        content = text(body, "content")
        if not 0 < len(content) <= MAXIMUM_CONTENT:
            raise Refused(47001)
        if body.get("version") != 2 or body.get("scene") not in (1, 2, 3, 4):
            raise Refused(40129)
        with world.lock:
            seen = world.memory.seen.get(text(body, "openid"))
            if seen is None or world.now() - seen > VISIT_SECONDS:
                raise Refused(61010)
        suggest = "risky" if "违禁" in content else "review" if "可疑" in content else "pass"
        if UNICODE_ESCAPE.search(request.get_data()):
            suggest = "pass"  # WeChat checks the bytes without decoding escapes
        result = {"suggest": suggest, "label": SUGGEST_LABEL[suggest]}
        return answer({**OK, "trace_id": secrets.token_hex(16), "result": result})

    @blueprint.post("/cgi-bin/message/subscribe/send")
    def send_subscribe_message() -> Response:
        check_access_token()
        body = read_body()
        to, template = text(body, "touser"), text(body, "template_id")
        with world.lock:
            memory = world.memory
            if to not in memory.seen and not any(openid == to for openid, _ in memory.acceptances):
                raise Refused(40003)
            if template not in memory.templates:
                raise Refused(40037)
            if "page" in body and not re.fullmatch(r"pages/\S+", text(body, "page")):
                raise Refused(41030)
            if not _is_template_data(body.get("data")):
                raise Refused(47003)
            if memory.acceptances[to, template] <= 0:
                raise Refused(43101)
            memory.acceptances[to, template] -= 1
            memory.subscribe_messages.append(body)
        return answer(OK)

    @blueprint.post("/cgi-bin/message/custom/send")
    def send_customer_message() -> Response:
        check_access_token()
        body = read_body()
        to, kind = text(body, "touser"), text(body, "msgtype")
        if kind not in CUSTOMER_MESSAGE_TYPES:
            raise Refused(40008)
        if not isinstance(body.get(kind), dict):
            raise Refused(47001)
        with world.lock:
            seen = world.memory.seen.get(to)
            if seen is None:
                raise Refused(40003)
            if world.now() - seen > CUSTOMER_MESSAGE_SECONDS:
                raise Refused(45015)
            world.memory.customer_messages.append(body)
        return answer(OK)

    @blueprint.post("/wxa/getwxacodeunlimit")
    def getwxacodeunlimit() -> Response:
        check_access_token()
        body = read_body()
        if not 0 < len(text(body, "scene")) <= 32:
            raise Refused(40169)
        if not re.fullmatch(r"[A-Za-z0-9!#$&'()*+,/:;=?@._~-]+", text(body, "scene")):
            raise Refused(40129)
        if text(body, "page").startswith("/"):
            raise Refused(41030)
        return Response(IMAGE, content_type="image/jpeg")

    @blueprint.post("/wxa/generate_urllink")
    def generate_urllink() -> Response:
        check_access_token()
        body = read_body()
        if "?" in text(body, "path"):
            raise Refused(40165)
        if len(text(body, "query")) > 1024:
            raise Refused(40212)
        return answer({**OK, "url_link": f"https://wxaurl.cn/{secrets.token_urlsafe(8)}"})

    return blueprint


def _is_template_data(data: Any) -> bool:
    if not isinstance(data, dict) or not data:
        return False
    return all(isinstance(part, dict) and isinstance(part.get("value"), str) for part in data.values())
