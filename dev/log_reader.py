"""The service's JSON lines as lines for people: `make run` and `make trace` print them."""

import json
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TextIO

SHORT = 8
"""How many digits of an id are shown in a column; `make trace` takes as many."""
SHOWN_ELSEWHERE = {"timestamp", "level", "message", "traceId", "spanId", "parentSpanId", "stack"}
SELDOM_WANTED = {"service", "instance", "version", "pid", "logger"}
SERIOUS = {"WARNING", "ERROR", "CRITICAL"}
COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
DIM, BOLD = "2", "1"


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and nobody has set NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def parse(line: str) -> dict[str, Any] | None:
    """The fields of a line; None if it is no JSON object."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def readable(line: str, colour: bool) -> str:
    """A line as `make run` prints it; what is no JSON object with a message stays as it is.

    The trace id is short, and once more in full at the end of what somebody may want to look into.

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
    """Local time, level, a mark, the message, the other fields, and the stack indented beneath.

    :param mark: what tells this line's origin from that of others.
    :param extra: fields to show beside the line's own.
    """
    level = text(fields.get("level", "-"))
    shown = {name: value for name, value in fields.items() if name not in SHOWN_ELSEWHERE | SELDOM_WANTED}
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
    """Words in a colour of ECMA-48's SGR."""
    return f"\x1b[{code}m{words}\x1b[m" if colour and code and words else words


def clock(timestamp: object) -> str:
    """The local time of an RFC 3339 timestamp, with milliseconds; the timestamp itself if it is none."""
    moment = local_time(timestamp)
    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}" if moment else f"{text(timestamp or '-'):12}"


def local_time(timestamp: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(timestamp)).astimezone()
    except (ValueError, OverflowError):
        return None


def short(identifier: object) -> str:
    """The first digits of an id, as wide as any other."""
    return f"{text(identifier)[:SHORT] if identifier else '-':{SHORT}}"


def value_text(value: object) -> str:
    """A value as it stands after `name=`: bare where it is one word, else as JSON."""
    if isinstance(value, str) and value and not set(value) & set(' "=') and value.isprintable():
        return value
    try:
        return text(json.dumps(value, ensure_ascii=False))
    except RecursionError:  # nested as deeply as could just be read
        return "…"


def text(value: object) -> str:
    """A text with what would steer the terminal, or break the line, spelled out."""
    words = str(value)
    if words.isprintable():
        return words
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in words
    )
