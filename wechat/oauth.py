"""WeChat's OAuth2: login on web pages inside WeChat, and by QR code on a PC."""

from typing import Any, NamedTuple
from urllib.parse import urlencode

from errors import Code
from wechat.client import is_identifier, read_nickname, read_unionid
from wechat.errcodes import AUTHORIZATION_ENDED, INVALID_TOKEN
from wechat.transport import Transport, failure, unexpected_response

QR_CODE_SCOPE = "snsapi_login"
SCOPES = ("snsapi_base", "snsapi_userinfo", QR_CODE_SCOPE)


class Authorization(NamedTuple):
    """A user's authorization of one of our web apps."""

    openid: str
    access_token: str
    refresh_token: str
    scope: str


class Grant(NamedTuple):
    """What WeChat returns for a code."""

    authorization: Authorization
    unionid: str | None
    is_snapshot_user: bool
    """Whether it is the virtual account of a user who only previews the page."""


class UserInfo(NamedTuple):
    """A user's profile."""

    nickname: str | None
    avatar_url: str | None
    unionid: str | None


class WebApp:
    """One official account or website application. Thread-safe.

    Source: https://developers.weixin.qq.com/doc/offiaccount/OA_Web_Apps/Wechat_webpage_authorization.html

    :param open_base_url: scheme, host and port of WeChat's authorize pages.
    """

    def __init__(self, transport: Transport, app_id: str, app_secret: str, open_base_url: str) -> None:
        self.app_id = app_id
        self._app_secret = app_secret
        self._transport = transport
        self._open_base_url = open_base_url.rstrip("/")

    def authorize_url(self, scope: str, redirect_uri: str, state: str) -> str:
        """The address of the page on which WeChat asks the user for consent.

        :param scope: one of SCOPES.
        :param state: up to 128 bytes, returned with the code.
        """
        page = "qrconnect" if scope == QR_CODE_SCOPE else "oauth2/authorize"
        # WeChat requires this order.
        query = {"appid": self.app_id, "redirect_uri": redirect_uri, "response_type": "code"}
        query |= {"scope": scope, "state": state}
        return f"{self._open_base_url}/connect/{page}?{urlencode(query)}#wechat_redirect"

    def redeem(self, code: str) -> Grant:
        """Redeem a code (sns/oauth2/access_token).

        :raises ApiError: WECHAT_CODE_INVALID, WECHAT_CODE_USED, and what `Transport.call` does.
        """
        path = "/sns/oauth2/access_token"
        params = {"appid": self.app_id, "secret": self._app_secret, "code": code, "grant_type": "authorization_code"}
        answer = self._transport.call(path, params)
        return Grant(_authorization(path, answer), read_unionid(path, answer), bool(answer.get("is_snapshotuser")))

    def userinfo(self, authorization: Authorization) -> tuple[UserInfo, Authorization]:
        """Get the user's nickname, picture and unionid (sns/userinfo), refreshing the access token if necessary.

        :returns: the profile, and the authorization to store from now on.
        :raises ApiError: WECHAT_CODE_INVALID if the authorization has ended, and what `Transport.call` does.
        """
        path = "/sns/userinfo"
        answer, authorization = self._call(path, authorization, lang="zh_CN")
        if errcode := answer.get("errcode"):
            raise failure(path, Code.WECHAT_CODE_INVALID, f"the authorization has ended, errcode {errcode}", errcode)
        if answer.get("openid") != authorization.openid:
            raise unexpected_response(path, "openid missing or different", answer)
        nickname, avatar_url = read_nickname(answer.get("nickname")) or None, answer.get("headimgurl") or None
        return UserInfo(nickname, avatar_url, read_unionid(path, answer)), authorization

    def is_valid(self, authorization: Authorization) -> tuple[bool, Authorization]:
        """Whether the authorization is still valid (sns/auth), refreshing the access token if necessary.

        :returns: the result, and the authorization to store from now on.
        :raises ApiError: what `Transport.call` does.
        """
        answer, authorization = self._call("/sns/auth", authorization)
        return answer.get("errcode") not in AUTHORIZATION_ENDED, authorization

    def _call(self, path: str, authorization: Authorization, **params: str) -> tuple[dict[str, Any], Authorization]:
        """Call with the access token; if WeChat rejects it, once more with a new one (sns/oauth2/refresh_token)."""

        def call() -> Any:
            query = {"access_token": authorization.access_token, "openid": authorization.openid, **params}
            return self._transport.call(path, query, expected=AUTHORIZATION_ENDED)

        answer = call()
        if answer.get("errcode") in INVALID_TOKEN:
            refresh = "/sns/oauth2/refresh_token"
            grant = {"appid": self.app_id, "grant_type": "refresh_token", "refresh_token": authorization.refresh_token}
            refreshed = self._transport.call(refresh, grant, expected=AUTHORIZATION_ENDED)
            if refreshed.get("errcode") not in AUTHORIZATION_ENDED:
                authorization = _authorization(refresh, refreshed)
                answer = call()
        return answer, authorization


def _authorization(path: str, answer: dict[str, Any]) -> Authorization:
    authorization = Authorization._make(answer.get(name) for name in Authorization._fields)
    openid, *tokens = authorization
    if not (is_identifier(openid) and all(isinstance(text, str) and 0 < len(text) <= 512 for text in tokens)):
        raise unexpected_response(path, "openid, tokens or scope missing or malformed", answer)
    return authorization
