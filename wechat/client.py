"""WeChat's server API as the mini-program; `Client.call` reaches any interface that has no method here."""

import re
from collections.abc import Mapping
from typing import Any

from wechat.access_token import AccessToken
from wechat.crypto import session_signature
from wechat.errcodes import INVALID_TOKEN, NOT_SUBSCRIBED, SESSION_ENDED
from wechat.transport import Body, Codes, Query, Transport, unexpected_response


class Client:
    """WeChat's server API as one mini-program. Thread-safe.

    Each method raises ApiError as `Transport.call` does; those that need an access token also raise what
    `AccessToken.get` does.
    """

    def __init__(self, transport: Transport, access_token: AccessToken, app_id: str, app_secret: str) -> None:
        self.app_id, self._app_secret = app_id, app_secret
        self.transport, self._access_token = transport, access_token

    def call(self, path: str, params: Query = None, body: Body = None, *, expected: Codes = (), **options: bool) -> Any:
        """Call any interface of WeChat that takes an access token.

        A mini-program code, a URL link and a customer service message:

            image = wechat.api.call("/wxa/getwxacodeunlimit", body={"scene": "id=7", "page": "pages/orders/index"})
            url = wechat.api.call("/wxa/generate_urllink", body={"path": "pages/orders/index"})["url_link"]
            message = {"touser": openid, "msgtype": "text", "text": {"content": "您的订单已发货"}}
            wechat.api.call("/cgi-bin/message/custom/send", body=message, idempotent=False)

        If WeChat rejects the token, it is replaced and the call is made once more.

        :param params: the query, without the token.
        :param body: posted as JSON if there is one; otherwise the call is a GET.
        :param expected: errcodes that are a result here, not a failure.
        :param options: `idempotent=False` if a call whose response was lost must not be made again; `media=False` if
            the response cannot be an image, audio or video.
        :returns: WeChat's JSON as a dict, or the bytes of an image, audio or video, up to 1 MB.
        """

        def call_with(token: str, expected: Codes) -> Any:
            query = {"access_token": token, **(params or {})}
            return self.transport.call(path, query, body, expected=expected, **{"media": True, **options})

        token = self._access_token.get()
        answer = call_with(token, {*expected, *INVALID_TOKEN})
        if isinstance(answer, dict) and answer.get("errcode") in INVALID_TOKEN:
            answer = call_with(self._access_token.get(refused=token), expected)
        return answer

    def code_to_session(self, code: str) -> tuple[str, str, str | None]:
        """Redeem a wx.login code (sns/jscode2session). Takes no access token, so login works without one.

        Source:
        https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/user-login/code2Session.html

        :returns: openid, session_key, and the unionid if there is one.
        :raises ApiError: also WECHAT_CODE_INVALID, WECHAT_CODE_USED, WECHAT_HIGH_RISK_USER.
        """
        path = "/sns/jscode2session"
        params = {"appid": self.app_id, "secret": self._app_secret, "js_code": code, "grant_type": "authorization_code"}
        answer = self.transport.call(path, params)
        openid, session_key = answer.get("openid"), answer.get("session_key")
        if not (is_identifier(openid) and isinstance(session_key, str) and re.fullmatch(r"[!-~]{1,64}", session_key)):
            raise unexpected_response(path, "openid or session_key missing or malformed", answer)
        return openid, session_key, read_unionid(path, answer)

    def is_session_key_valid(self, openid: str, session_key: str) -> bool:
        """Whether this is still the user's session_key (wxa/checksession).

        Source: https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/user-login/checkSessionKey.html
        """
        params = {"openid": openid, "signature": session_signature(session_key), "sig_method": "hmac_sha256"}
        answer: dict[str, Any] = self.call("/wxa/checksession", params, expected=SESSION_ENDED, media=False)
        return answer.get("errcode") not in SESSION_ENDED

    def code_to_phone(self, code: str, openid: str) -> str:
        """Redeem a getPhoneNumber button's code (wxa/business/getuserphonenumber).

        Source: https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/user-info/phone-number/getPhoneNumber.html

        :param openid: WeChat checks that the code belongs to this user.
        :returns: the number in the form of `phone_number`.
        :raises ApiError: also WECHAT_CODE_INVALID, which a wx.login code and another user's code get too.
        """
        path = "/wxa/business/getuserphonenumber"
        answer = self.call(path, body={"code": code, "openid": openid}, media=False)
        info = answer.get("phone_info")
        watermark = info.get("watermark") if isinstance(info, dict) else None
        number = phone_number(info) if isinstance(watermark, dict) and watermark.get("appid") == self.app_id else None
        if number is None:
            raise unexpected_response(path, "phone_info missing, malformed or for another app", answer)
        return number

    def is_risky(self, text: str, openid: str, *, scene: int = 1, nickname: str | None = None) -> bool:
        """Whether WeChat's content check, version 2, advises against a text (wxa/msg_sec_check).

        Source: https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/sec-center/sec-check/msgSecCheck.html

        :param text: at most 2,500 characters.
        :param openid: the author's; WeChat requires a visit to the mini-program within the last two hours.
        :param scene: 1 profile, 2 comment, 3 forum, 4 social log.
        :param nickname: the author's.
        :raises ApiError: also SESSION_KEY_STALE if the author's last visit is longer ago, CONTENT_REFUSED.
        """
        path = "/wxa/msg_sec_check"
        body = {"content": text, "version": 2, "scene": scene, "openid": openid}
        answer = self.call(path, body=body if nickname is None else {**body, "nickname": nickname}, media=False)
        result = answer.get("result")
        suggestion = result.get("suggest") if isinstance(result, dict) else None
        if suggestion not in ("pass", "review", "risky"):
            raise unexpected_response(path, "result.suggest missing or unknown", answer)
        return bool(suggestion == "risky")

    def send_subscribe_message(self, openid: str, template_id: str, data: Mapping[str, str], **optional: str) -> bool:
        """Send a message that the user has subscribed to (cgi-bin/message/subscribe/send).

        It is not sent again if the response is lost, as it may have arrived. Source:
        https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/mp-message-management/subscribe-message/sendMessage.html

        :param data: the template's keywords and their texts.
        :param optional: further fields: `page`, the page that a tap opens, such as `pages/orders/index?id=7`;
            `miniprogram_state`, `developer`, `trial` or (WeChat's default) `formal`; `lang`, `zh_CN` (WeChat's
            default), `en_US`, `zh_HK` or `zh_TW`.
        :returns: whether it was sent; False if the user has not subscribed, or no longer.
        :raises ApiError: INTERNAL_ERROR also if WeChat does not know the openid, template, page or a keyword; the
            errcode is in the log.
        """
        texts = {name: {"value": value} for name, value in data.items()}
        body = {"touser": openid, "template_id": template_id, "data": texts, **optional}
        path = "/cgi-bin/message/subscribe/send"
        answer: dict[str, Any] = self.call(path, body=body, expected=NOT_SUBSCRIBED, idempotent=False, media=False)
        return answer.get("errcode") not in NOT_SUBSCRIBED


def phone_number(info: Mapping[str, Any]) -> str | None:
    """Read the phone number in a response or in decrypted data.

    :returns: the 11 digits for mainland China; `+`, country code and number for the rest of the world; None if there
        is no valid number.
    """
    number, country = str(info.get("purePhoneNumber")), str(info.get("countryCode"))  # WeChat sends 86 and "86"
    is_valid = re.fullmatch(r"[0-9]{5,15}", number) and re.fullmatch(r"[0-9]{1,4}", country)
    if not is_valid or not str(info.get("phoneNumber")).endswith(number):  # forged data may differ in its first bytes
        return None
    return number if country == "86" else f"+{country}{number}"


def read_unionid(path: str, answer: Mapping[str, Any]) -> str | None:
    """Read the unionid in the response of an interface; None if there is none.

    :raises ApiError: UPSTREAM_INVALID if it is malformed.
    """
    unionid = answer.get("unionid") or None
    if unionid is not None and not is_identifier(unionid):
        raise unexpected_response(path, "malformed unionid", answer)
    return unionid


def read_nickname(value: Any) -> Any:
    """Read a nickname, on one line and without blanks around it."""
    return re.sub("[\t\n\r]+", " ", value).strip() if isinstance(value, str) else value


def is_identifier(value: object) -> bool:
    """Whether this has the form of an openid or unionid: up to 64 letters, digits, `-` and `_`."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value) is not None
