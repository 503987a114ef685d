"""WeChat's OAuth2: login on web pages inside WeChat, and by QR code on a PC."""

from typing import Any, NamedTuple
from urllib.parse import urlencode

from wechat.client import is_identifier, read_nickname, read_unionid
from wechat.errcodes import AUTHORIZATION_ENDED
from wechat.transport import Transport, unexpected_response

QR_CODE_SCOPE = "snsapi_login"
SCOPES = ("snsapi_base", "snsapi_userinfo", QR_CODE_SCOPE)


class Grant(NamedTuple):
    """What WeChat returns for a code: a user's authorization of one of our web apps."""

    openid: str
    access_token: str
    refresh_token: str
    unionid: str | None
    is_snapshot_user: bool
    """Whether it is the virtual account of a user who only previews the page."""


class WebApp:
    """One official account or website application. Thread-safe.

    Source: https://developers.weixin.qq.com/doc/offiaccount/OA_Web_Apps/Wechat_webpage_authorization.html

    :param open_base_url: scheme, host and port of WeChat's authorize pages.
    """

    def __init__(self, transport: Transport, app_id: str, app_secret: str, open_base_url: str) -> None:
        self.app_id, self._app_secret = app_id, app_secret
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
        openid, token, refresh_token = (answer.get(name) for name in ("openid", "access_token", "refresh_token"))
        if not (is_identifier(openid) and _is_token(token) and _is_token(refresh_token)):
            raise unexpected_response(path, "openid or tokens missing or malformed", answer)
        return Grant(openid, token, refresh_token, read_unionid(path, answer), bool(answer.get("is_snapshotuser")))

    def userinfo(self, grant: Grant) -> tuple[dict[str, Any], str | None]:
        """Get the user's profile (sns/userinfo).

        :returns: `nickname` and `avatar_url`, each of which may be None, and the unionid.
        :raises ApiError: WECHAT_CODE_INVALID if the authorization has ended, and what `Transport.call` does.
        """
        path = "/sns/userinfo"
        query = {"access_token": grant.access_token, "openid": grant.openid, "lang": "zh_CN"}
        answer = self._transport.call(path, query)
        if answer.get("openid") != grant.openid:
            raise unexpected_response(path, "openid missing or different", answer)
        nickname, avatar_url = read_nickname(answer.get("nickname")) or None, answer.get("headimgurl") or None
        return {"nickname": nickname, "avatar_url": avatar_url}, read_unionid(path, answer)

    def is_valid(self, refresh_token: str) -> bool:
        """Whether the user's authorization is still valid: whether it can be refreshed (sns/oauth2/refresh_token).

        :raises ApiError: what `Transport.call` does.
        """
        query = {"appid": self.app_id, "grant_type": "refresh_token", "refresh_token": refresh_token}
        answer: dict[str, Any] = self._transport.call("/sns/oauth2/refresh_token", query, expected=AUTHORIZATION_ENDED)
        return answer.get("errcode") not in AUTHORIZATION_ENDED


def _is_token(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 512
