"""Hides secrets and personal data in texts that may quote data: messages, exceptions, stacks and text fields.

Two rules, and no more: the secrets of the settings are hidden, and so is all that looks like a secret or like personal
data. A short name in the message of somebody else's exception is not found, so our own log calls have constant messages
and quote nothing.
"""

import base64
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

HIDDEN = "…"
TEXT_CHARACTERS = 4000

_secrets: set[str] = set()
_hosts: set[str] = set()
"""Those of the settings: the host names of cloud databases look like tokens."""

_SECRET_NAME = re.compile(r"(?i:secret|keys?$|token|openids|pass|pwd)")
_PATTERNS = (
    (r"(?<=://)[^\s/@'\"]{0,500}@", f"{HIDDEN}@"),  # user and password of a URL
    (r"\?[^\s'\"<>=]{0,200}=[^\s'\"<>]*", f"?{HIDDEN}"),  # the query of a URL
    (r"(?i:\b(bearer|basic)\s+[^\s'\",]+)", rf"\1 {HIDDEN}"),
    (  # the value after a telling name, as in token=… or {'phone': '…'}
        r"(?i:(\b(?:\w{0,40}(?:secret|token|password|passwd|pwd|session_?key|signature|openid|unionid|phone|mobile"
        r"|email|card)|authorization|cookie|code|key|name|nickname|data|iv|remark)[\"']?\s*[=:]\s*(?:b(?=[\"']))?)"
        r"(?!(?<=code: )-?\d{1,5}\b|(?<=password: )(?:YES|NO)\b)"  # a status or exit code; MySQL's "using password"
        r"(\"[^\"]*\"|'[^']*'|[^\s\"'&,;)}\]]+))",
        rf"\1{HIDDEN}",
    ),
    (r"[\w.+-]{1,64}(?:@|%40)[\w-]{1,63}(?:\.[\w-]{1,63})+", HIDDEN),  # an e-mail address
    (r"(?:\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|%[0-9a-fA-F]{2})+", HIDDEN),  # non-ASCII, escaped
    (r"[^\x00-\x7f]+", HIDDEN),  # and as it is: code and libraries speak English
)
_RUN = re.compile(r"[A-Za-z0-9+/_=-]{16,}")
# Phone, identity card and bank card, also in groups; not a date.
_DIGITS = re.compile(r"\d{8,}|(?!20\d\d-[01]\d-[0-3]\d\b)\d(?:[ -]?\d){9,}")
# WeChat's rid, which its support asks for, and the path of a file or an interface.
_SHOWN_RUN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){2}|/?[a-z0-9_.-]{1,24}(?:/[a-z0-9_.-]{1,24})+/?")


def hide_settings(config: Mapping[str, Any]) -> None:
    """Hide the secrets of these settings from now on."""
    for name, value in config.items():
        if value and _SECRET_NAME.search(name):
            for secret in value if isinstance(value, list) else re.split(" *, *", str(value)):
                _secrets.add(base64.b64encode(secret).decode() if isinstance(secret, bytes) else secret)
        elif isinstance(value, str) and "://" in value:
            url = urlsplit(value)
            _hosts.add(url.netloc.rpartition("@")[2])
            given = [url.password or "", *(text for name, text in parse_qsl(url.query) if name.endswith("password"))]
            _secrets.update(filter(None, [*given, *map(unquote, given)]))
    _secrets.update([quote(secret) for secret in _secrets])
    _scrub.cache_clear()


def scrub(text: str) -> str:
    """Make free text fit to be written: TEXT_CHARACTERS of it at most."""
    return _scrub(text[: 2 * TEXT_CHARACTERS])  # twice as many, so that no secret is cut in two before it is found


@lru_cache(1000)  # most texts are constants
def _scrub(text: str) -> str:
    for secret in sorted(_secrets, key=len, reverse=True):
        if secret in text:  # a short one only as a word of its own: `pay` must not make `…load` of `payload`
            text = re.sub(re.escape(secret) if len(secret) >= 8 else rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    for pattern, replacement in _PATTERNS:
        text = re.sub(pattern, replacement, text)
    text = _DIGITS.sub(HIDDEN, _RUN.sub(_hide_run, text))
    return text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]}{HIDDEN}"


def _hide_run(match: re.Match[str]) -> str:
    """Tokens, keys, hashes and openids are long runs with letters and digits, or in mixed case; words are not."""
    run = match[0]
    is_word = not (re.search(r"\d", run) and re.search("[A-Za-z]", run)) and (len(run) < 26 or run == run.lower())
    return run if is_word or _SHOWN_RUN.fullmatch(run) or any(run in host for host in _hosts) else HIDDEN
