import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from werkzeug.datastructures import Headers

from telemetry.fields import FIELDS
from telemetry.logs import (
    BATCH_LINES,
    CAPACITY,
    FLUSH_SECONDS,
    STACK_CHARACTERS,
    JsonLineFormatter,
    QueuedHandler,
    RequestRecord,
)
from telemetry.redaction import HIDDEN, hide
from telemetry.traces import RequestSpan
from tests.harness import ROOT, wait_until

Lines = Callable[[], list[dict[str, Any]]]
TRACE_ID, PARENT_ID = "a" * 32, "b" * 16

logger = logging.getLogger("some.part")


def test_a_line_has_the_fields_of_the_house_first_and_in_order(log_lines: Lines) -> None:
    span = RequestSpan("GET", "/livez", Headers({"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}))
    logger.warning("ready after %d s: 快上", 3, extra={"reason": "redis"})
    span.end(200)
    (line,) = log_lines()
    assert list(line)[:6] == ["timestamp", "level", "service", "traceId", "message", "spanId"]
    assert set(line) < set(FIELDS)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert re.fullmatch("[0-9a-f]{16}", line["spanId"])
    assert line.pop("spanId") != PARENT_ID
    assert line == {
        "level": "WARNING",
        "service": "kuaishang",
        "traceId": TRACE_ID,
        "message": "ready after 3 s: 快上",
        "reason": "redis",
        "instance": "here:8000",
        "version": "0",
        "logger": "some.part",
        "pid": os.getpid(),
    }


def test_outside_of_a_request_there_is_no_trace_id(log_lines: Lines) -> None:
    logger.warning("ready")
    (line,) = log_lines()
    assert line["traceId"] is None
    assert "spanId" not in line


def test_a_line_break_stays_inside_its_line(log_lines: Lines) -> None:
    logger.error("said: %s", 'two\nlines", "level": "forged')
    (line,) = log_lines()
    assert line["level"] == "ERROR"
    assert line["message"].startswith("said: two\nlines")


def test_an_exception_has_its_type_its_message_and_its_stack_as_fields(log_lines: Lines) -> None:
    try:
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise ValueError("the effect") from cause
    except ValueError:
        logger.exception("it failed")
    (line,) = log_lines()
    assert line["message"] == "it failed"
    assert (line["exceptionType"], line["exceptionMessage"]) == ("ValueError", "the effect")
    assert re.search(
        r"KeyError: 'the cause'\n.*raise ValueError\(.*ValueError: the effect\n$", line["stack"], re.DOTALL
    )


@pytest.mark.parametrize(
    "extra",
    [{"orderId": 7}, {"reason": {"nested": "mapping"}}, {"status": "not a number"}, {"code": True}, {"status": 2**31}],
    ids=lambda extra: next(iter(extra)),
)
def test_a_field_that_is_not_declared_or_of_another_type_is_named_and_not_written(
    log_lines: Lines, extra: dict[str, Any]
) -> None:
    logger.info("it happened", extra=extra)
    (line,) = log_lines()
    (name,) = extra
    assert line["undeclared"] == [name]
    assert name not in line


def test_arguments_that_do_not_fit_cost_the_arguments_and_not_the_line() -> None:
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(JsonLineFormatter("here", "0"))
    line = json.loads(handler.format(logging.makeLogRecord({"msg": "%d of %d", "args": ("hunter2",)})))
    assert line["message"] == "%d of %d (TypeError in its arguments)"


def test_a_line_that_cannot_be_written_says_where_and_the_next_one_comes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "lines").open("wb") as file:
        handler = QueuedHandler(JsonLineFormatter("here", "0"), lambda: None, file.fileno())
        handler.handle(logging.makeLogRecord({"name": "\ud800", "args": ("hunter2",), "pathname": "/a/place.py"}))
        handler.handle(RequestRecord("\ud800", logging.INFO, ("", ""), {}))
        handler.handle(RequestRecord("access", logging.INFO, ("", ""), {}))
        handler.close()
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["message"] for line in lines] == ["a line cannot be written"] * 2 + ["request"]
    assert lines[0]["reason"] == "UnicodeEncodeError at place.py:0"
    assert "hunter2" not in str(lines) + str(capfd.readouterr())


@pytest.mark.parametrize("broken", ["raises", "is a group", "has notes", "has many causes", "has no frames"])
def test_whatever_an_exception_is_like_its_line_is_written(log_lines: Lines, broken: str) -> None:
    class Raises(Exception):
        def __str__(self) -> str:
            raise RuntimeError("hunter2")

    error: Exception = {
        "raises": Raises(),
        "is a group": ExceptionGroup("some", [ValueError("the first"), KeyError("the second")]),
        "has notes": ValueError("the message"),
        "has many causes": ValueError("the last"),
        "has no frames": SyntaxError("invalid syntax", ("users.py", 2, 5, "def broken(: # a broken line")),
    }[broken]
    said = {
        "raises": "(RuntimeError in its __str__)",
        "is a group": "  ValueError: the first\n  KeyError: 'the second'\n",
        "has notes": "and a note",
        "has many causes": "ValueError: the last",
        "has no frames": f'File "users.py", line 2\n    def broken(: # {HIDDEN}',
    }[broken]
    hide("a broken line")
    error.add_note("and a note")
    cause: BaseException = error
    for number in range(2000 if broken == "has many causes" else 0):
        cause.__cause__ = ValueError(str(number))
        cause = cause.__cause__
    logger.error("it failed", exc_info=error)
    (line,) = log_lines()
    assert said in line["stack"]
    assert len(line["stack"]) <= STACK_CHARACTERS
    assert "hunter2" not in str(line)


class Pipe:
    """A handler that writes to a pipe, which nobody reads unless told so."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.dropped = 0
        self.handler = QueuedHandler(JsonLineFormatter("here", "0"), self._drop, self.writer)

    def _drop(self) -> None:
        self.dropped += 1

    def log(self, message: str) -> None:
        self.handler.handle(logging.makeLogRecord({"msg": message}))

    def read_while_it_closes(self, before: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """All that is written by then.

        :param before: what is done while somebody reads already.
        """
        with ThreadPoolExecutor(1) as pool, os.fdopen(self.reader, encoding="utf-8") as stream:
            lines = pool.submit(lambda: [json.loads(line) for line in stream])
            before()
            self.handler.close()
            os.close(self.writer)
            return lines.result()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.handler.close()


def test_without_a_reader_nobody_waits_and_what_is_dropped_is_counted_and_told(pipe: Pipe) -> None:
    sent = CAPACITY + 5000
    for number in range(sent):
        pipe.log(f"line number {number}")
    assert 0 < pipe.dropped < 5000  # some had found room in the pipe

    def log_one_more() -> None:
        wait_until(lambda: pipe.handler._queue.empty())
        pipe.log("and one more")

    lines = pipe.read_while_it_closes(log_one_more)
    told = sum(line["dropped"] for line in lines if line["message"] == "log lines were dropped")
    assert told == pipe.dropped
    assert sum(line["message"].startswith("line number") for line in lines) == sent - pipe.dropped
    assert [line["message"] for line in lines if line["message"].startswith("and")] == ["and one more"]


def test_long_lines_may_wait_in_smaller_number(pipe: Pipe) -> None:
    for _ in range(CAPACITY // 10 + BATCH_LINES + 200):  # the thread has a batch in hand, and the pipe a few lines
        pipe.log("word " * 1000)
    assert 0 < pipe.dropped < BATCH_LINES + 200
    pipe.log("a short one")
    lines = pipe.read_while_it_closes()
    assert "a short one" in [line["message"] for line in lines]
    assert sum(line.get("dropped", 0) for line in lines) == pipe.dropped


def test_what_is_queued_is_written_at_the_end(pipe: Pipe) -> None:
    for number in range(1000):
        pipe.log(f"line number {number}")
    lines = pipe.read_while_it_closes()
    assert [line["message"] for line in lines] == [f"line number {number}" for number in range(1000)]


def test_the_end_does_not_wait_for_a_reader_for_ever(pipe: Pipe) -> None:
    for _ in range(2000):
        pipe.log("a line that is long enough to fill a pipe with not too many others like it")
    started = time.monotonic()
    pipe.handler.close()
    assert time.monotonic() - started < 5
    os.close(pipe.reader)


def test_the_end_waits_once_for_a_reader_that_reads_nothing_and_counts_what_is_lost(pipe: Pipe) -> None:
    sent = 3 * BATCH_LINES
    for number in range(sent):
        pipe.log(f"line number {number}")
    started = time.monotonic()
    pipe.handler.close()
    assert sent - BATCH_LINES < pipe.dropped <= sent  # a pipe holds some hundred
    pipe.handler.close()  # as the logging module does at the end of the process
    assert FLUSH_SECONDS <= time.monotonic() - started < 2 * FLUSH_SECONDS
    os.close(pipe.reader)
    pipe.handler._thread.join(5)
    os.close(pipe.writer)


def test_lines_for_a_reader_that_is_gone_count_as_dropped(pipe: Pipe) -> None:
    os.close(pipe.reader)
    pipe.log("for nobody")
    wait_until(lambda: pipe.dropped == 1)


def test_a_descriptor_that_does_not_block_gets_all_lines_too(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    for _ in range(3000):
        pipe.log("a line that is long enough to fill a pipe with not too many others like it")
    lines = pipe.read_while_it_closes()
    assert len(lines) == 3000


def test_long_lines_of_several_processes_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telemetry.logs.FLUSH_SECONDS", 30)  # they wait for the reader, and then for one another
    reader, writer = os.pipe()
    children = []
    for name in "abcd":
        child = os.fork()
        if not child:
            try:
                handler = QueuedHandler(JsonLineFormatter("here", "0"), lambda: None, writer)
                error = _error_with_a_long_message(name)
                for _ in range(50):
                    handler.handle(logging.makeLogRecord({"msg": name * 15, "exc_info": error}))
                handler.close()
            finally:
                os._exit(0)
        children.append(child)
    os.close(writer)
    time.sleep(1)  # until each has more to write than the pipe takes
    with os.fdopen(reader, encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    for child in children:
        os.waitpid(child, 0)
    assert len(lines) == 200
    assert all(set(line["exceptionMessage"]) == {line["message"][0], " ", HIDDEN} for line in lines)


def _error_with_a_long_message(word: str) -> tuple[Any, ...]:
    return ValueError, ValueError(f"{word * 9} " * 2000), None


def test_the_exception_that_ends_a_process_is_a_line_and_not_on_stderr() -> None:
    code = "from telemetry import logs; logs.configure('INFO', 'here', '0'); 1 / 0"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (1, "")
    line = json.loads(ended.stdout)
    assert (line["level"], line["message"], line["exceptionType"]) == ("CRITICAL", "uncaught", "ZeroDivisionError")
    assert "stack" in line


def test_a_handler_goes_on_in_a_forked_process() -> None:
    """As gunicorn's does, of which the master has one."""
    reader, writer = os.pipe()
    handler = QueuedHandler(JsonLineFormatter("here", "0"), lambda: None, writer)
    child = os.fork()
    if not child:
        try:
            handler.start()  # configure() registers that for the one that it makes
            handler.handle(logging.makeLogRecord({"msg": "from the child"}))
            handler.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    handler.handle(logging.makeLogRecord({"msg": "from the parent"}))
    handler.close()
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        assert [json.loads(line)["message"] for line in stream] == ["from the child", "from the parent"]
