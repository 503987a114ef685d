"""The envelope, the one table of codes, the exceptions and the global error handler."""

import errno
import random
import re
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple, cast

import msgspec
from flask import Flask, Response, current_app, has_request_context, request
from redis.exceptions import RedisError
from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_accept_header

LANGUAGES = ("zh", "en")


def language() -> str:
    """Return the language that the request prefers; zh by default, and outside of a request."""
    return _preferred(request.environ.get("HTTP_ACCEPT_LANGUAGE", "") if has_request_context() else "")


@lru_cache(100)
def _preferred(accepted: str) -> str:
    """Return the language that an Accept-Language prefers. `zh-CN` and `zh_TW` both ask for zh, and q=0 excludes."""
    ranges = parse_accept_header(re.sub("[-_][^,;]*", "", accepted.lower()) + ",*;q=0.0001")
    return max((name for name in (*ranges.values(), *LANGUAGES) if name in LANGUAGES), key=ranges.quality)


class Message(NamedTuple):
    """A text for API clients, in both languages."""

    chinese: str
    english: str

    def __str__(self) -> str:
        """The text in the language that the request prefers."""
        return self.english if language() == "en" else self.chinese


class Code(Enum):
    """The business codes: number, HTTP status, message in Chinese and in English; below, what a client should do.

    openapi.json and the documents for people say the same.
    """

    SUCCESS = 200, 200, "操作成功", "Success"
    """使用 data。 | Use data."""
    INVALID_INPUT = 400, 400, "请求参数有误，详见 data.errors", "Invalid input; data.errors names the fields"
    """不要重试；按 data.errors 修正输入，或在对应的表单项旁显示。 |
    Do not retry. Correct the fields of data.errors, or show each problem beside its form field."""
    UNAUTHORIZED = 401, 401, "未登录或登录已过期，请重新登录", "Not logged in, or the session has expired: log in again"
    """调用 wx.login 重新登录一次，再把请求发送一次。 |
    Call wx.login, log in again once, then repeat the request once."""
    FORBIDDEN = 403, 403, "没有权限", "Forbidden"
    """不要重试；显示 message。 | Do not retry. Show the message."""
    NOT_FOUND = 404, 404, "资源不存在", "Not found"
    """不要重试；告知内容不存在，并刷新列表。 | Do not retry. Say that it does not exist, and refresh the list."""
    METHOD_NOT_ALLOWED = 405, 405, "不支持该请求方法，见 Allow 响应头", "Method not allowed; see the Allow header"
    """修正客户端代码：方法或地址写错了。 | Correct the client: the method or the path is wrong."""
    CONFLICT = 409, 409, "与资源的当前状态冲突，请刷新后再试", "Conflicts with the resource as it is now: read it again"
    """重新读取资源，显示 message，由用户决定。 | Read the resource again and show the message; the user decides."""
    PRECONDITION_FAILED = 412, 412, "资源已被修改，请重新获取", "The resource has changed: read it again"
    """重新读取，在新版本上再改，用新的 version 作 If-Match。 |
    Read it again, apply the change to what it is now, and send its new version as If-Match."""
    PAYLOAD_TOO_LARGE = 413, 413, "请求体过大", "The request body is too large"
    """不要重试；缩短内容，或分几次发送。 | Do not retry. Send less, or in several requests."""
    UNSUPPORTED_MEDIA_TYPE = 415, 415, "Content-Type 必须是 application/json", "Content-Type must be application/json"
    """修正客户端代码：以 application/json 发送 JSON。 | Correct the client: send JSON as application/json."""
    PRECONDITION_REQUIRED = 428, 428, "没有有效的 If-Match 请求头：请填 version", "No valid If-Match: send the version"
    """先读取资源，把其 version 加引号作为 If-Match。 |
    Read the resource first, and send its version, quoted, as If-Match."""
    TOO_MANY_REQUESTS = 429, 429, "请求过于频繁，请稍后再试", "Too many requests: retry later"
    """等 Retry-After 秒后再试，并减少请求。 |
    Wait as many seconds as Retry-After says, then retry; send fewer requests."""
    WECHAT_CODE_INVALID = 460, 400, "code 无效或过期，请重新调用 wx.login", "Code invalid or expired: call wx.login"
    """重新调用 wx.login（手机号：请用户再点按钮），用新的 code 再试一次。 |
    Call wx.login again (for a phone number: ask for another tap), and retry once with the new code."""
    WECHAT_CODE_USED = 461, 400, "code 已被使用，请重新调用 wx.login", "Code already used: call wx.login again"
    """同 460：每个 code 只能用一次。 | As with 460: a code works once."""
    WECHAT_HIGH_RISK_USER = 462, 403, "微信判定该用户为高风险用户", "WeChat classifies this user as high-risk"
    """不要重试；显示 message，用户可联系微信。 | Do not retry. Show the message; the user may contact WeChat."""
    SESSION_KEY_STALE = 463, 409, "数据已过时，请重新点按钮获取再提交", "Stale data: tap the button again, then send"
    """静默登录一次，请用户再点一次按钮，提交新数据。 |
    Log in silently, ask for another tap on the button, and send the new data."""
    SIGNATURE_MISMATCH = 464, 400, "签名或水印不符，请重新获取数据", "Bad signature or watermark: get the data again"
    """不要重发同样的数据；请用户再点一次按钮，提交新数据。 |
    Do not send the same data again: ask for another tap on the button, and send the new data."""
    IDEMPOTENCY_KEY_REUSED = 465, 409, "该 key 已用于另一请求，请更换", "Idempotency-Key already used: send a new one"
    """修正客户端代码：每个新操作用新的 Idempotency-Key。 |
    Correct the client: each new operation needs a new Idempotency-Key."""
    CONTENT_REFUSED = 466, 400, "内容未通过微信安全检查，请修改", "Rejected by WeChat's content check: change it"
    """请用户修改文字后再提交。 | Ask the user to change the text, then send it again."""
    INTERNAL_ERROR = 500, 500, "服务器内部错误，反馈时请附 X-Trace-Id", "Internal error: report it with X-Trace-Id"
    """不要自动重试；致歉，并显示 X-Trace-Id 供反馈。 |
    Do not retry automatically. Apologise, and show X-Trace-Id for a report."""
    UPSTREAM_INVALID = 502, 502, "微信返回了无法识别的响应", "Unexpected response from WeChat"
    """稍后再试一次；仍失败则附 X-Trace-Id 反馈。 |
    Retry once, later. If it still fails, report it with X-Trace-Id."""
    UNAVAILABLE = 503, 503, "服务暂时不可用，请稍后再试", "Temporarily unavailable: retry later"
    """等 Retry-After 秒后重试读取和带 Idempotency-Key 的写入，次数有限。 |
    Wait as many seconds as Retry-After says, then retry reads and writes with an Idempotency-Key, a few times."""
    UPSTREAM_TIMEOUT = 504, 504, "微信响应超时，请稍后再试", "WeChat did not respond in time: retry later"
    """稍后重试；写入须带同一 Idempotency-Key。 | Retry later; a write only with the same Idempotency-Key."""
    WECHAT_REFUSED = 520, 502, "微信拒绝了本服务的凭据，须运维处理", "WeChat rejects this service: an operator must act"
    """不要重试；告知服务暂时不可用，并通知运维。 |
    Do not retry. Say that the service is not available, and tell the operator."""

    def __init__(self, number: int, status: int, chinese: str, english: str) -> None:
        self.number = number
        self.status = status
        self.message = Message(chinese, english)


_UNAVAILABLE = (RedisError, exc.OperationalError, exc.InterfaceError, exc.TimeoutError, StaleDataError)
"""The exceptions that become a 503: also if Redis takes no writes, and if a transaction lost every race."""
NO_DESCRIPTOR = errno.EMFILE, errno.ENFILE
"""Of an OSError: this process, or the machine, can open nothing for now."""
_CODE_BY_STATUS = {code.status: code for code in Code if code.number == code.status != 400}
RETRY_SECONDS = 1, 5
"""Of Retry-After, at random, so that clients do not come back together."""
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": ""}, 503: {"Retry-After": ""}}
"""What the responses of a status have beside their own headers; what is empty is made for each of them."""
_ERRORS, _CHARACTERS = 20, 60
"""How many fields `data.errors` names, and how much of a name, which the caller may have chosen, it repeats."""


def envelope(code: Code, data: Any, message: Message | str | None = None) -> bytes:
    """Make the JSON of every response, with its three keys."""
    return msgspec.json.encode({"code": code.number, "message": str(message or code.message), "data": data})


class ApiError(HTTPException):
    """Stop the request and respond with this code.

    :param errors: what is wrong, by field; becomes `data.errors`.
    :param message: replaces the code's own message where that would mislead.
    """

    def __init__(self, code: Code, *, errors: dict[str, Any] | None = None, message: Message | None = None) -> None:
        super().__init__(code.message.english)
        self.api_code = code
        self.code = code.status
        self.errors = errors
        self.message = message


def is_temporary(error: object) -> bool:
    """Whether the same may succeed later: Redis, the database or WeChat fails, or nothing can be opened."""
    is_ours = isinstance(error, ApiError) and error.api_code.status >= 500
    return is_ours or isinstance(error, _UNAVAILABLE) or getattr(error, "errno", None) in NO_DESCRIPTOR


def conflict(field: str, reason: Message) -> ApiError:
    """Make the error of a write that the current state forbids.

    :param reason: for a person; the message, and what is wrong with the field.
    """
    return ApiError(Code.CONFLICT, errors={field: [str(reason)]}, message=reason)


def init_app(app: Flask) -> None:
    """Respond to every failure, of whatever kind, in the envelope."""
    for failure in (HTTPException, exc.IntegrityError, *_UNAVAILABLE):
        app.register_error_handler(failure, handle_error)


def handle_error(error: Exception) -> Response:
    """Respond to a failure in the envelope, keeping the headers that belong to it (Allow, Retry-After)."""
    http_error = _http_error(error)
    code, message = code_and_message(http_error)
    request.environ["kuaishang.code"] = code.number  # for telemetry
    errors = _first(getattr(http_error, "errors", None) or {}, _ERRORS)
    response = cast(Response, http_error.get_response(request.environ))
    response.data = envelope(code, {"errors": errors} if errors else None, message)
    response.content_type = "application/json"
    for name, value in HEADERS.get(response.status_code, {}).items():
        response.headers.setdefault(name, value or str(random.randint(*RETRY_SECONDS)))  # noqa: S311
    return response


def _http_error(error: Any) -> HTTPException:
    """Return what the caller gets to know of an error, and log it if Redis, the database or a descriptor failed."""
    # The session is saved after the view has returned, where Flask makes every failure a crash.
    crash = getattr(error, "original_exception", None) or error
    cause = getattr(crash, "orig", None) or crash  # the driver's own message, without what SQLAlchemy adds
    if isinstance(crash, exc.IntegrityError):  # a row was created or deleted concurrently, again in each retry
        current_app.logger.warning("conflict in the database: %s", cause)
        return ApiError(Code.CONFLICT)
    if isinstance(crash, ApiError) or not is_temporary(crash):
        return crash if isinstance(crash, ApiError) else error
    who = "Redis" if isinstance(crash, RedisError) else "a descriptor" if isinstance(crash, OSError) else "the database"
    kind = f"{type(cause).__module__}.{type(cause).__qualname__}"
    current_app.logger.error("%s is unavailable: %s", who, cause, extra={"exceptionType": kind})
    return ApiError(Code.UNAVAILABLE)


def _first(errors: dict[Any, Any], count: int) -> dict[str, Any]:
    """Keep the first errors, so that a response is small whatever came in; nested ones share the count."""
    share = max(1, count // (len(errors) or 1))
    return {
        str(name)[:_CHARACTERS]: _first(problem, share) if isinstance(problem, dict) else problem
        for name, problem in list(errors.items())[:count]
    }


def code_and_message(error: HTTPException) -> tuple[Code, Message | None]:
    """Return a code, and a message if its own would not be true, such as that of 400 for a URL that is too long."""
    if isinstance(error, ApiError):
        return error.api_code, error.message
    if code := _CODE_BY_STATUS.get(error.code or 500):
        return code, None
    message = Message(f"无法处理该请求：{error.name}", f"This request cannot be handled: {error.name}")
    return (Code.INVALID_INPUT if (error.code or 500) < 500 else Code.INTERNAL_ERROR), message
