"""The simulator's state, in memory."""

import base64
import hashlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dev.wechat_simulator.tokens import TokenPool

CODE_SECONDS = 300


@dataclass
class LoginCode:
    """A code of wx.login, valid until it is used or expires."""

    openid: str
    unionid: str | None
    expires_at: float
    used: bool = False


@dataclass(frozen=True)
class PhoneCode:
    """A code of the getPhoneNumber button, valid until it expires."""

    openid: str | None
    phone: str
    country_code: str
    expires_at: float


@dataclass(frozen=True)
class Person:
    """The user in the browser."""

    openid: str
    unionid: str | None = None
    nickname: str = "微信用户"
    avatar_url: str = "https://thirdwx.qlogo.cn/mmopen/vi_32/avatar/132"
    snapshot: bool = False


@dataclass(frozen=True)
class Grant:
    """A user's authorization of an app."""

    app_id: str
    person: Person
    openid: str
    scope: str


@dataclass
class WebCode:
    """A code of the web login, valid until it is used or expires."""

    grant: Grant
    expires_at: float
    used: bool = False


@dataclass(frozen=True)
class WebToken:
    """An access token or refresh token of the web login, valid until it expires."""

    grant: Grant
    expires_at: float


@dataclass
class Fault:
    """A fault, and how many more times it occurs."""

    kind: str
    times: int
    seconds: float
    errcode: int


@dataclass
class Memory:
    """The state that DELETE /simulator resets. Guarded by the lock of the World."""

    offset: float = 0
    calls: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, Fault] = field(default_factory=dict)
    codes: dict[str, LoginCode] = field(default_factory=dict)
    session_keys: dict[str, str] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    """The time of each openid's last visit to the mini-program."""
    phone_codes: dict[str, PhoneCode] = field(default_factory=dict)
    phone_answers: int = 0
    tokens: TokenPool = field(default_factory=TokenPool)
    templates: set[str] = field(default_factory=set)
    acceptances: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many more messages of a template an openid accepts."""
    subscribe_messages: list[dict[str, Any]] = field(default_factory=list)
    customer_messages: list[dict[str, Any]] = field(default_factory=list)
    browsing: Person | None = None
    web_codes: dict[str, WebCode] = field(default_factory=dict)
    web_access_tokens: dict[str, WebToken] = field(default_factory=dict)
    web_refresh_tokens: dict[str, WebToken] = field(default_factory=dict)

    def secrets(self) -> list[str]:
        """Every value that must not be revealed."""
        ids = [(code.grant.person.openid, code.grant.person.unionid) for code in self.web_codes.values()]
        ids += [(code.openid, code.unionid) for code in self.codes.values()]
        return [
            *(text for pair in ids for text in pair if text),
            *(code.phone for code in self.phone_codes.values()),
            *self.session_keys.values(),
            *self.tokens.uses,
            *self.codes,
            *self.phone_codes,
            *self.web_codes,
            *self.web_access_tokens,
            *self.web_refresh_tokens,
        ]


class World:
    """WeChat's view of one mini-program and its web apps."""

    def __init__(self, app_id: str, app_secret: str, web_apps: Mapping[str, str]) -> None:
        self.app_id = app_id
        self.secrets = {app_id: app_secret, **web_apps}
        self._persons_app_id = next(iter(web_apps), app_id)
        self.lock = threading.Lock()
        self.memory = Memory()

    def now(self) -> float:
        """The time on WeChat's clock."""
        return time.time() + self.memory.offset

    def openid_of(self, person: Person, app_id: str) -> str:
        """A person's openid, which differs in every app; the first web app has the configured one."""
        if app_id == self._persons_app_id:
            return person.openid
        digest = hashlib.sha256(f"{person.openid} {app_id}".encode()).digest()
        return "o" + base64.urlsafe_b64encode(digest)[:27].decode()


def new_openid() -> str:
    return "o" + secrets.token_urlsafe(20)[:27]


def new_code() -> str:
    return "0" + secrets.token_hex(15) + "w"


def new_session_key() -> str:
    return base64.b64encode(secrets.token_bytes(16)).decode()
