import json
import os
import pty
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dev.log_reader import readable, wants_colour

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
LINE = {
    "timestamp": "2026-11-23T15:59:00.045Z",
    "level": "INFO",
    "service": "kuaishang",
    "traceId": TRACE_ID,
    "message": "request",
    "spanId": "00f067aa0ba902b7",
    "method": "GET",
    "route": "/api/v1/users/<user:user_id>",
    "status": 200,
    "durationMs": 12.5,
    "instance": "here:8000",
    "version": "0.1.0",
    "logger": "telemetry.access_log",
    "pid": 7,
}


@pytest.fixture(autouse=True)
def _in_beijing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def read(colour: bool = False, **different: Any) -> str:
    return readable(json.dumps({**LINE, **different}), colour)


def test_a_line_shows_local_time_level_short_trace_id_message_and_fields() -> None:
    assert read() == (
        "23:59:00.045 INFO    4bf92f35 request method=GET route=/api/v1/users/<user:user_id> status=200 durationMs=12.5"
    )


def test_a_value_of_several_words_is_quoted() -> None:
    quoted = {'no "answer" 在': r'"no \"answer\" 在"', "": '""', "a=b": '"a=b"'}
    assert all(read(reason=value).endswith(f" reason={shown}") for value, shown in quoted.items())
    assert read(columns=["phone", "email"]).endswith(' columns=["phone", "email"]')


def test_warnings_and_errors_show_the_full_trace_id() -> None:
    for level in ("WARNING", "ERROR", "CRITICAL"):
        assert read(level=level).endswith(f" traceId={TRACE_ID}")
        assert "traceId" not in read(level=level, traceId=None)


def test_a_stack_is_indented_below() -> None:
    first, *beneath = read(stack='Traceback:\n  File "x.py"\nValueError: bad\n').splitlines()
    assert first == read()
    assert beneath == ["    Traceback:", '      File "x.py"', "    ValueError: bad"]


def test_line_breaks_and_control_characters_are_escaped() -> None:
    shown = read(message="one\ntwo \x1b[2J \u202e", reason="\x1b]0;title\x07", stack="a\x1b[1A", **{"\x1b[m": "\r"})
    assert r"one\ntwo \x1b[2J \u202e" in shown
    assert shown.replace("\n    ", "").isprintable()


def test_other_lines_are_unchanged_and_deep_ones_do_not_crash() -> None:
    for line in ("", "Traceback:", "null", "[1]", '"text"', "{", "{}", '{"a": 1}', "[" * 100_000):
        assert readable(line, colour=True) == line
    for depth in range(900, 1000, 9):  # near what can be nested
        assert readable(f'{{"message": "x", "a": {"[" * depth}{"]" * depth}}}', colour=False)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted({*LINE, "stack", "x"})) | st.text(), anything), st.booleans())
def test_any_object_is_formatted(fields: dict[str, Any], colour: bool) -> None:
    shown = readable(json.dumps({"message": "", **fields}), colour)
    assert all(line.startswith("    ") for line in shown.split("\n")[1:])


def test_an_invalid_timestamp_is_shown_unchanged() -> None:
    for timestamp in (None, 5, "yesterday", "0001-01-01T00:00:00+23:59"):
        assert read(timestamp=timestamp).startswith(str(timestamp or "-"))


def test_colours_do_not_change_the_text() -> None:
    coloured = read(colour=True, level="ERROR")
    assert "\x1b[31mERROR" in coloured
    for code in ("\x1b[31m", "\x1b[2m", "\x1b[1m", "\x1b[m"):
        coloured = coloured.replace(code, "")
    assert coloured == read(level="ERROR")


@pytest.mark.parametrize(
    ("different", "wanted"), [({"NO_COLOR": ""}, True), ({"NO_COLOR": "0"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_are_for_terminals_unless_disabled(
    monkeypatch: pytest.MonkeyPatch, different: dict[str, str], wanted: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **different}.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master), open(os.devnull, "w") as other:
        assert (wants_colour(terminal), wants_colour(other)) == (wanted, False)
