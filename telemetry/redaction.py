"""Keeps secrets and personal data out of what is written, whichever way they come.

What stands in the source code is shown as it stands. All else is free text, and loses the secrets of the settings; what
this request or work has in hand (`hide`: what was sent, decrypted, read from WeChat or from the database); and what
looks like a secret or like personal data.
"""

import base64
import html
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from flask import Request
from werkzeug.datastructures import MultiDict

HIDDEN = "…"
REMEMBERED = 1000
"""How many values are remembered at the most; a request that loads more rows than that forgets the first ones."""

TEXTS = 5000
"""How many texts there may be in them; with more, no free text is shown."""
TEXT_CHARACTERS = 4000

_in_hand: ContextVar[deque[object]] = ContextVar("in_hand", default=deque(maxlen=REMEMBERED))  # noqa: B039  for no request
_secrets: set[str] = set()
_hosts: set[str] = set()
"""Those of the settings: what a cloud calls a database looks like a token."""

_NAMED = re.compile(  # what has a telling name, as in token=… or {'phone': '…'}
    r"(?i:(\b(?:\w{0,40}(?:secret|token|password|passwd|pwd|session_?key|signature|openid|unionid|phone|mobile|email|card)"
    r"|authorization|cookie|code|key|name|nickname|data|iv|remark)[\"']?\s*[=:]\s*(?:b(?=[\"']))?)"
    r"(?!(?<=code: )-?\d{1,5}\b|(?<=password: )(?:YES|NO)\b)"  # of a status or an exit; whether MySQL was given one
    r"(\"[^\"]*\"|'[^']*'|[^\s\"'&,;)}\]]+))"
)
_PATTERNS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=://)[^\s/@'\"]{0,500}@", f"{HIDDEN}@"),  # user and password of a URL
        (r"\?[^\s'\"<>=]{0,200}=[^\s'\"<>]*", f"?{HIDDEN}"),  # the query of a URL
        (r"(?i:\b(bearer|basic)\s+[^\s'\",]+)", rf"\1 {HIDDEN}"),
        (_NAMED, rf"\1{HIDDEN}"),
        (r"[\w.+-]{1,64}(?:@|%40)[\w-]{1,63}(?:\.[\w-]{1,63})+", HIDDEN),  # an e-mail address
        (r"(?:\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|%[0-9a-fA-F]{2})+", HIDDEN),  # what is no ASCII, escaped
        (r"[^\x00-\x7f]+", HIDDEN),  # and as it is: code and libraries speak English
    )
]
_RUN = re.compile(r"[A-Za-z0-9+/_=-]{16,}")
_DIGITS = re.compile(r"\d{8,}|\d(?:[ -]?\d){9,}")  # phone, identity card and bank card, also in groups
_DATE = re.compile(r"20\d\d-[01]\d-[0-3]\d(?: [0-2]\d)?")
_SHOWN_RUN = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{8}){2}"  # WeChat's rid, which its support asks for
    r"|/?[a-z0-9_.-]{1,24}(?:/[a-z0-9_.-]{1,24})+/?"  # a path, of a file or of an interface
)


def hide(*values: object) -> None:
    """Remember that what goes on now must not show these values.

    :param values: texts, or mappings, sequences and objects of them. They are looked into only when free text is
        written, so that this costs next to nothing.
    """
    _in_hand.get().extend(value for value in values if value is not None)


def begin(*values: object) -> Token[deque[object]]:
    """Begin to remember anew, for a request; `end` takes what this returns."""
    return _in_hand.set(deque(values, REMEMBERED))


def end(token: Token[deque[object]]) -> None:
    _in_hand.reset(token)


def hide_settings(config: Mapping[str, Any]) -> None:
    """Remember the secrets of the settings for as long as the process lives."""
    for name, value in config.items():
        if value and re.search(r"SECRET|KEYS?$|TOKEN|OPENIDS", name):
            for secret in value if isinstance(value, list) else re.split(" *, *", str(value)):
                _secrets.add(base64.b64encode(secret).decode() if isinstance(secret, bytes) else secret)
        elif isinstance(value, str) and "://" in value:
            url = urlsplit(value)
            _hosts.add(url.hostname or "")
            _secrets.update(filter(None, (url.password, unquote(url.password or ""))))
            query = parse_qsl(url.query)
            _secrets.update(secret for key, secret in query if re.search("(?i:pass|pwd|secret|token)", key))


def scrub(text: str) -> str:
    """Make free text fit to be written: TEXT_CHARACTERS of it at the most."""
    text = text[: 2 * TEXT_CHARACTERS]  # twice as many, so that nothing hidden is cut in two before it is found
    values = {*_secrets, *islice(_texts(_in_hand.get()), TEXTS + 1)}
    if len(values) > TEXTS + len(_secrets):
        return HIDDEN  # nobody sends that many but to have one overlooked
    found = {form for value in values for form in _forms(value) if form in text}
    for value in sorted(found, key=len, reverse=True):
        # A short one is hidden only where it is a word of its own: `pay` must not make `…load` of `payload`.
        if len(value) >= 8 or not value.isascii():
            text = text.replace(value, HIDDEN)
    if words := [re.escape(value) for value in found if len(value) < 8]:
        text = re.sub(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", HIDDEN, text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    text = _DIGITS.sub(_hide_digits, _RUN.sub(_hide_run, text))
    return text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]}{HIDDEN}"


def scrub_named(text: str) -> str:
    """Hide what has a telling name before it, of a text whose parts have been scrubbed one by one."""
    return _NAMED.sub(rf"\1{HIDDEN}", text)


def _forms(value: str) -> tuple[str, ...]:
    """A value as it is, and as it looks where it is quoted."""
    if value.isalnum():
        return (value,)
    return (
        value,
        value.strip(),
        html.escape(value),
        quote(value),
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        quote_plus(value),
    )


def _hide_digits(match: re.Match[str]) -> str:
    return match[0] if _DATE.fullmatch(match[0]) else HIDDEN


def _hide_run(match: re.Match[str]) -> str:
    """Tokens, keys, hashes and openids are long runs with letters and digits; words are not."""
    run = match[0]
    is_word = not re.search(r"\d", run) or not re.search(r"[A-Za-z]", run)
    return run if is_word or _SHOWN_RUN.fullmatch(run) or any(run in host for host in _hosts) else HIDDEN


def _texts(values: Iterable[object], depth: int = 8) -> Iterator[str]:
    """All texts in these values that are long enough to tell anybody anything."""
    for value in list(values):
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif isinstance(value, int) and value >= 1_000_000:
            value = str(value)  # a phone number; smaller ones tell nothing
        if isinstance(value, str):
            if len(value) >= (4 if value.isascii() else 2):
                yield value
        elif not depth:
            yield str(value)
        elif isinstance(value, Request):
            sent: list[object] = [value.args, value.view_args, value.cookies]
            # Of the body as much as was read.
            sent += [vars(value).get(name) for name in ("_cached_data", "_cached_json", "form")]
            sent += [text for name, text in value.headers if name.startswith("X-Wx-")]
            sent.append(value.headers.get("Authorization", "").partition(" ")[2])
            yield from _texts(sent, depth - 1)
        elif isinstance(value, Mapping):
            several = value.to_dict(flat=False) if isinstance(value, MultiDict) else value
            yield from _texts(several.values(), depth - 1)
        elif isinstance(value, list | tuple | set | frozenset):
            yield from _texts(value, depth - 1)
