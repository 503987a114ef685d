"""WeChat's server API over one `requests.Session`: timeouts, one retry, errcode to error code."""

import json
import logging
import re
import time
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter

from errors import ApiError, Code

logger = logging.getLogger(__name__)
# At DEBUG urllib3 logs whole URLs, and WeChat wants the app secret in the URL.
logging.getLogger("urllib3").setLevel(logging.WARNING)

CONNECT_SECONDS = 1
READ_SECONDS = 3
ANSWER_SECONDS = 4
MAXIMUM_ANSWER_BYTES = 1024 * 1024
RETRY_PAUSE_SECONDS = 0.2
PATIENCE_SECONDS = 15
"""No call takes longer than this: two tries, each with a last wait for a part of the answer. Sending the headers byte
by byte is the one way to stretch it."""

BUSY = -1
CODE_BY_ERRCODE = {
    BUSY: Code.UNAVAILABLE,
    45009: Code.UNAVAILABLE,  # daily quota
    45011: Code.UNAVAILABLE,  # quota a minute
    40029: Code.WECHAT_CODE_INVALID,
    41008: Code.WECHAT_CODE_INVALID,  # no code at all
    40163: Code.WECHAT_CODE_USED,
    40226: Code.WECHAT_HIGH_RISK_USER,
    40013: Code.WECHAT_REFUSED,  # app id
    40125: Code.WECHAT_REFUSED,  # app secret
    40164: Code.WECHAT_REFUSED,  # our IP address is not on the account's list
    41002: Code.WECHAT_REFUSED,  # no app id
    41004: Code.WECHAT_REFUSED,  # no app secret
    48001: Code.WECHAT_REFUSED,  # the account may not use this interface
}


class CodeSession(NamedTuple):
    """What a wx.login code is worth."""

    openid: str
    session_key: str
    unionid: str | None


class Client:
    """One mini-program's view of WeChat. May be shared by threads.

    :param base_url: where the API answers, without a path.
    :param connections: how many are kept open at the most.
    """

    def __init__(self, app_id: str, app_secret: str, base_url: str, connections: int) -> None:
        self.app_id = app_id
        self._app_secret = app_secret
        self._base_url = base_url.rstrip("/")
        self._http = requests.Session()
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=connections)
        self._http.mount("https://", adapter)
        self._http.mount("http://", adapter)
        self._http.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def close(self) -> None:
        """Close the connections that are kept open."""
        self._http.close()

    def code_to_session(self, code: str) -> CodeSession:
        """Redeem a wx.login code (sns/jscode2session). Takes no access token, so login works without one.

        Takes PATIENCE_SECONDS at the most. Source:
        https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/user-login/code2Session.html

        :raises ApiError: WECHAT_CODE_INVALID, WECHAT_CODE_USED, WECHAT_HIGH_RISK_USER, WECHAT_REFUSED, UNAVAILABLE,
            UPSTREAM_TIMEOUT, UPSTREAM_INVALID.
        """
        path = "/sns/jscode2session"
        answer = self._get(
            path,
            appid=self.app_id,
            secret=self._app_secret,
            js_code=code,
            grant_type="authorization_code",
        )
        openid, session_key, unionid = (answer.get(name) or "" for name in CodeSession._fields)
        if not (_identifies(openid) and _identifies(session_key) and (not unionid or _identifies(unionid))):
            raise _failure(path, Code.UPSTREAM_INVALID, "no openid or session_key, or one that is none")
        return CodeSession(openid, session_key, unionid or None)

    def _get(self, path: str, **params: str) -> dict[str, Any]:
        """Call WeChat, and once more if it is busy or the connection is lost.

        An exception of requests holds the URL and so the app secret: none of them goes further than this.
        """
        for may_retry in (True, False):
            try:
                status, body = self._exchange(path, params)
            except requests.Timeout:
                raise _failure(path, Code.UPSTREAM_TIMEOUT, "no answer in time") from None
            except requests.ConnectionError as error:
                if not may_retry:
                    raise _failure(path, Code.UNAVAILABLE, f"no connection: {_root_cause(error)}") from None
            except requests.RequestException as error:
                raise _failure(path, Code.UPSTREAM_INVALID, f"broken answer: {type(error).__name__}") from None
            else:
                answer = _parse(path, status, body)
                errcode = _errcode(path, answer)
                if errcode == 0:
                    return answer
                if errcode != BUSY or not may_retry:
                    code = CODE_BY_ERRCODE.get(errcode, Code.UPSTREAM_INVALID)
                    raise _failure(path, code, f"errcode {errcode}: {answer.get('errmsg')}")
            time.sleep(RETRY_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def _exchange(self, path: str, params: dict[str, str]) -> tuple[int, bytes]:
        """Send a request and read the answer, which a timeout of requests alone lets trickle for ever."""
        deadline = time.monotonic() + ANSWER_SECONDS
        with self._http.get(
            self._base_url + path,
            params=params,
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            allow_redirects=False,
            stream=True,
        ) as response:
            body = b""
            try:
                while part := response.raw.read1(65536, decode_content=True):
                    body += part
                    if time.monotonic() > deadline:
                        raise requests.Timeout
                    if len(body) > MAXIMUM_ANSWER_BYTES:
                        raise requests.RequestException
            except urllib3.exceptions.ReadTimeoutError:
                raise requests.Timeout from None
            except urllib3.exceptions.HTTPError:  # cut short: WeChat has done its part, so it is not asked again
                raise requests.RequestException from None
            return response.status_code, body


def _parse(path: str, status: int, body: bytes) -> dict[str, Any]:
    """Read the body as UTF-8 JSON, whatever the content type says."""
    try:
        answer = json.loads(body.decode())
    except (ValueError, RecursionError):
        answer = None
    if status != 200 or not isinstance(answer, dict):
        raise _failure(path, Code.UPSTREAM_INVALID, f"HTTP {status}, {len(body)} bytes")
    return answer


def _errcode(path: str, answer: dict[str, Any]) -> int:
    """Absent and 0 both mean success; the presence of errcode or errmsg alone means nothing."""
    try:
        return int(answer.get("errcode") or 0)
    except (TypeError, ValueError, OverflowError):
        raise _failure(path, Code.UPSTREAM_INVALID, "errcode is not a number") from None


def _identifies(value: object) -> bool:
    """Whether it is what WeChat tells users and sessions apart by: up to 64 characters of ASCII."""
    return isinstance(value, str) and re.fullmatch(r"[!-~]{1,64}", value) is not None


def _root_cause(error: BaseException) -> str:
    """The name of the innermost exception, such as ConnectionRefusedError; the text would hold the URL."""
    while error.__context__:
        error = error.__context__
    return type(error).__name__


def _failure(path: str, code: Code, why: str) -> ApiError:
    """Log why a call failed, which the answer will not say; errmsg holds the `rid` that WeChat's support asks for."""
    if code in (Code.WECHAT_REFUSED, Code.UPSTREAM_INVALID):
        level = logging.ERROR  # it will not pass by itself
    else:
        level = logging.WARNING if code.number >= 500 else logging.INFO
    logger.log(level, "WeChat call failed", extra={"interface": path, "code": code.number, "reason": why})
    return ApiError(code)
