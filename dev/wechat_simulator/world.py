"""All that the simulator knows, in memory."""

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
    """What a code of wx.login stands for, until it is used or too old."""

    openid: str
    unionid: str | None
    expires_at: float
    used: bool = False


@dataclass(frozen=True)
class PhoneCode:
    """What a code of the getPhoneNumber button stands for, until it is too old."""

    openid: str | None
    phone: str
    country_code: str
    expires_at: float


@dataclass(frozen=True)
class Person:
    """Somebody in front of a browser."""

    openid: str
    unionid: str | None = None
    nickname: str = "微信用户"
    avatar_url: str = "https://thirdwx.qlogo.cn/mmopen/vi_32/avatar/132"
    snapshot: bool = False


@dataclass(frozen=True)
class Grant:
    """What somebody allowed an app."""

    app_id: str
    person: Person
    openid: str
    scope: str


@dataclass
class WebCode:
    """What a code of the web login stands for, until it is used or too old."""

    grant: Grant
    expires_at: float
    used: bool = False


@dataclass(frozen=True)
class WebToken:
    """What an access token or refresh token of the web login stands for, until it is too old."""

    grant: Grant
    expires_at: float


@dataclass
class Fault:
    """What is to go wrong, and how many more times."""

    kind: str
    times: int
    seconds: float
    errcode: int


@dataclass
class Memory:
    """What DELETE /simulator forgets. Only for whoever holds the lock of the World."""

    offset: float = 0
    calls: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, Fault] = field(default_factory=dict)
    codes: dict[str, LoginCode] = field(default_factory=dict)
    session_keys: dict[str, str] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    """When each openid was last in the mini-program."""
    phone_codes: dict[str, PhoneCode] = field(default_factory=dict)
    phone_answers: int = 0
    tokens: TokenPool = field(default_factory=TokenPool)
    templates: set[str] = field(default_factory=set)
    acceptances: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many more messages an openid accepts of a template."""
    subscribe_messages: list[dict[str, Any]] = field(default_factory=list)
    customer_messages: list[dict[str, Any]] = field(default_factory=list)
    browsing: Person | None = None
    web_codes: dict[str, WebCode] = field(default_factory=dict)
    web_access_tokens: dict[str, WebToken] = field(default_factory=dict)
    web_refresh_tokens: dict[str, WebToken] = field(default_factory=dict)

    def secrets(self) -> list[str]:
        """Whatever of all this nobody may tell anybody."""
        told = [(code.grant.person.openid, code.grant.person.unionid) for code in self.web_codes.values()]
        told += [(code.openid, code.unionid) for code in self.codes.values()]
        return [
            *(text for pair in told for text in pair if text),
            *(code.phone for code in self.phone_codes.values()),
            *self.session_keys.values(),
            *self.tokens.issued(),
            *self.codes,
            *self.phone_codes,
            *self.web_codes,
            *self.web_access_tokens,
            *self.web_refresh_tokens,
        ]


class World:
    """One mini-program and its web apps, as WeChat knows them."""

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
        """The name of a person, which every app knows by another; the first web app by the one that he was given."""
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
