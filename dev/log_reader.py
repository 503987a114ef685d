"""Formats the service's JSON log lines for reading: `make run` and `make trace` print them."""

import json
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TextIO

SHORT = 8
"""How many digits of an id are shown; `make trace` accepts as few."""
SHOWN_ELSEWHERE = {"timestamp", "level", "message", "traceId", "spanId", "parentSpanId", "stack"}
HIDDEN = {"service", "instance", "version", "pid", "logger"}
SERIOUS = {"WARNING", "ERROR", "CRITICAL"}
COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
DIM, BOLD = "2", "1"


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and NO_COLOR (https://no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def parse(line: str) -> dict[str, Any] | None:
    """Return the fields of a line; None if it is not a JSON object."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def readable(line: str, colour: bool) -> str:
    """Format a line for `make run`; a line that is not a JSON object with a message is returned unchanged.

    The trace id is shortened; warnings and errors repeat it in full at the end.

    :param line: without its line break.
    :returns: one line or, with a stack, several; without the last line break.
    """
    fields = parse(line)
    if fields is None or "message" not in fields:
        return line
    trace_id = fields.get("traceId")
    extra = {"traceId": trace_id} if trace_id and text(fields.get("level")) in SERIOUS else {}
    return lay_out(fields, short(trace_id), colour, extra)


def lay_out(fields: Mapping[str, Any], mark: str, colour: bool, extra: Mapping[str, Any] | None = None) -> str:
    """Format as local time, level, a mark, the message, the other fields, and the stack indented below.

    :param mark: identifies the origin of the line.
    :param extra: further fields to show.
    """
    level = text(fields.get("level", "-"))
    shown = {name: value for name, value in fields.items() if name not in SHOWN_ELSEWHERE | HIDDEN}
    pairs = [
        paint(f"{text(name)}=", DIM, colour) + value_text(value) for name, value in {**shown, **(extra or {})}.items()
    ]
    words = [
        paint(clock(fields.get("timestamp")), DIM, colour),
        paint(f"{level:7}", COLOURS.get(level, BOLD), colour),
        paint(mark, DIM, colour),
        paint(text(fields.get("message", "")), BOLD if level in SERIOUS else "", colour),
        *pairs,
    ]
    stack = fields.get("stack")
    lines = [" ".join(words)] + [f"    {text(part)}" for part in (str(stack).splitlines() if stack else [])]
    return "\n".join(lines)


def paint(words: str, code: str, colour: bool) -> str:
    """Colour a text with an SGR code of ECMA-48."""
    return f"\x1b[{code}m{words}\x1b[m" if colour and code and words else words


def clock(timestamp: object) -> str:
    """Format an RFC 3339 timestamp as local time with milliseconds; anything else is returned unchanged."""
    moment = local_time(timestamp)
    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}" if moment else f"{text(timestamp or '-'):12}"


def local_time(timestamp: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(timestamp)).astimezone()
    except (ValueError, OverflowError):
        return None


def short(identifier: object) -> str:
    """Shorten an id to a fixed width."""
    return f"{text(identifier)[:SHORT] if identifier else '-':{SHORT}}"


def value_text(value: object) -> str:
    """Format a value for `name=value`: bare if it is one word, as JSON otherwise."""
    if isinstance(value, str) and value and not set(value) & set(' "=') and value.isprintable():
        return value
    try:
        return text(json.dumps(value, ensure_ascii=False))
    except RecursionError:  # nested as deeply as the parser just accepted
        return "…"


def text(value: object) -> str:
    """Escape whatever would control the terminal or break the line."""
    words = str(value)
    if words.isprintable():
        return words
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in words
    )
