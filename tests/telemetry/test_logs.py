import logging
import re
from collections.abc import Callable
from typing import Any

from telemetry.logs import trace_id

Lines = Callable[[], list[dict[str, Any]]]


def test_a_line_has_the_fields_of_the_house_first_and_in_order(log_lines: Lines) -> None:
    trace_id.set("a" * 32)
    logging.getLogger("some.part").warning("ready after %d s: 快上", 3, extra={"part": "redis"})
    trace_id.set(None)
    (line,) = log_lines()
    assert list(line) == ["timestamp", "level", "service", "traceId", "message", "part"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "WARNING",
        "service": "kuaishang",
        "traceId": "a" * 32,
        "message": "ready after 3 s: 快上",
        "part": "redis",
    }


def test_a_line_break_stays_inside_its_line(log_lines: Lines) -> None:
    logging.getLogger("some.part").error('two\nlines", "level": "forged')
    (line,) = log_lines()
    assert line["message"] == 'two\nlines", "level": "forged'
    assert line["level"] == "ERROR"
