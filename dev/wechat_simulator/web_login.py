"""The web login: the pages of open.weixin.qq.com, and the rest of sns/*."""

from urllib.parse import urlencode, urlsplit

from flask import Blueprint, Response, redirect, render_template_string, request
from werkzeug.wrappers import Response as BaseResponse

from dev.wechat_simulator.tokens import new_token
from dev.wechat_simulator.wire import OK, UNKNOWN_CODE, Refused, answer, require
from dev.wechat_simulator.world import CODE_SECONDS, Grant, Person, WebCode, WebToken, World, new_code, new_openid

ACCESS_TOKEN_SECONDS = 7200
REFRESH_TOKEN_SECONDS = 30 * 86400
MAXIMUM_STATE_BYTES = 128
AGREEMENT = """<!doctype html>
<html lang="zh-CN"><head><meta charset="utf-8"><title>微信登录</title></head><body>
<h1>{{ nickname }}，{{ app_id }} 申请使用你的微信身份（{{ scope }}）</h1>
<a id="agree" href="{{ agree }}">允许</a>
<a id="decline" href="{{ decline }}">拒绝</a>
</body></html>
"""
MISTAKE = """<!doctype html>
<html lang="zh-CN"><head><meta charset="utf-8"><title>出错了</title></head><body><p>{{ mistake }}</p></body></html>
"""


def web_login(world: World) -> Blueprint:
    """Make the routes of the web login."""
    blueprint = Blueprint("web_login", __name__)

    def ask(*scopes: str) -> BaseResponse | str:
        """Ask the user for consent; both choices are links back to the app."""
        given = request.args
        app_id, scope, state = (given.get(name, "") for name in ("appid", "scope", "state"))
        back = given.get("redirect_uri", "")
        checks = {
            "AppID 参数错误": app_id in world.secrets,
            "redirect_uri 参数错误": _is_web_url(back),
            "response_type 参数错误": given.get("response_type") == "code",
            "Scope 参数错误或没有 Scope 权限": scope in scopes,
            "state 参数过长": len(state.encode()) <= MAXIMUM_STATE_BYTES,
        }
        for mistake, is_valid in checks.items():
            if not is_valid:
                return render_template_string(MISTAKE, mistake=mistake)
        code = new_code()
        with world.lock:
            person = world.memory.browsing or Person(new_openid())
            grant = Grant(app_id, person, world.openid_of(person, app_id), scope)
            world.memory.web_codes[code] = WebCode(grant, world.now() + CODE_SECONDS)
        agree, decline = _link(back, code=code, state=state), _link(back, state=state)
        if scope == "snsapi_base":
            return redirect(agree)
        return render_template_string(
            AGREEMENT, nickname=person.nickname, app_id=app_id, scope=scope, agree=agree, decline=decline
        )

    def grant_of_access_token() -> Grant:
        require(access_token=41001, openid=41009)
        with world.lock:
            token = world.memory.web_access_tokens.get(request.args["access_token"])
        if token is None:
            raise Refused(40001)
        if token.expires_at <= world.now():
            raise Refused(42001)
        if token.grant.openid != request.args["openid"]:
            raise Refused(40003)
        return token.grant

    def tokens(grant: Grant, refresh_token: str) -> dict[str, str | int]:
        """Issue an access token. The caller holds the lock."""
        access_token = new_token()
        world.memory.web_access_tokens[access_token] = WebToken(grant, world.now() + ACCESS_TOKEN_SECONDS)
        return {
            "access_token": access_token,
            "expires_in": ACCESS_TOKEN_SECONDS,
            "refresh_token": refresh_token,
            "openid": grant.openid,
            "scope": grant.scope,
        }

    @blueprint.get("/connect/oauth2/authorize")
    def authorize() -> BaseResponse | str:
        return ask("snsapi_base", "snsapi_userinfo")

    @blueprint.get("/connect/qrconnect")
    def qrconnect() -> BaseResponse | str:
        return ask("snsapi_login")

    @blueprint.get("/sns/oauth2/access_token")
    def access_token() -> Response:
        require(appid=41002, secret=41004, code=41008)
        given = request.args
        if given.get("grant_type") != "authorization_code":
            raise Refused(40002)
        if given["appid"] not in world.secrets:
            raise Refused(40013)
        if given["secret"] != world.secrets[given["appid"]]:
            raise Refused(40125)
        with world.lock:
            code = world.memory.web_codes.get(given["code"])
            if code is None:
                raise Refused(40029, UNKNOWN_CODE)
            if code.expires_at <= world.now() or code.grant.app_id != given["appid"]:
                raise Refused(40029)
            if code.used:
                raise Refused(40163)
            code.used = True
            refresh_token = new_token()
            world.memory.web_refresh_tokens[refresh_token] = WebToken(code.grant, world.now() + REFRESH_TOKEN_SECONDS)
            body = tokens(code.grant, refresh_token)
        person = code.grant.person
        if person.unionid and code.grant.scope != "snsapi_base":
            body["unionid"] = person.unionid
        if person.snapshot:
            body["is_snapshotuser"] = 1
        return answer(body)

    @blueprint.get("/sns/oauth2/refresh_token")
    def refresh_token() -> Response:
        require(appid=41002, refresh_token=41003)
        given = request.args
        if given.get("grant_type") != "refresh_token":
            raise Refused(40002)
        if given["appid"] not in world.secrets:
            raise Refused(40013)
        with world.lock:
            token = world.memory.web_refresh_tokens.get(given["refresh_token"])
            if token is None or token.grant.app_id != given["appid"]:
                raise Refused(40030)
            if token.expires_at <= world.now():
                raise Refused(42002)
            body = tokens(token.grant, given["refresh_token"])
        return answer(body)

    @blueprint.get("/sns/userinfo")
    def userinfo() -> Response:
        grant = grant_of_access_token()
        if grant.scope == "snsapi_base":
            raise Refused(48001)
        person = grant.person
        body = {
            "openid": grant.openid,
            "nickname": person.nickname,
            "sex": 0,
            "province": "",
            "city": "",
            "country": "",
            "headimgurl": person.avatar_url,
            "privilege": [],
        }
        if person.unionid:
            body["unionid"] = person.unionid
        return answer(body)

    @blueprint.get("/sns/auth")
    def auth() -> Response:
        grant_of_access_token()
        return answer(OK)

    return blueprint


def _is_web_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _link(url: str, **parameters: str) -> str:
    parts = urlsplit(url)
    return parts._replace(query="&".join(filter(None, [parts.query, urlencode(parameters)]))).geturl()
