import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from telemetry import logs
from telemetry.logs import CAPACITY, JsonLineFormatter, LineHandler
from telemetry.redaction import HIDDEN
from telemetry.traces import RequestSpan
from tests.harness import (
    METRICS_TOKEN,
    ROOT,
    WAIT_SECONDS,
    Service,
    bearer,
    bound_to_this_process,
    counted,
    suspend,
    wait_until,
)

Lines = Callable[[], list[dict[str, Any]]]
TRACE_ID, PARENT_ID = "a" * 32, "b" * 16

logger = logging.getLogger("some.part")


def test_a_line_has_the_declared_fields(log_lines: Lines) -> None:
    span = RequestSpan("GET", {"HTTP_TRACEPARENT": f"00-{TRACE_ID}-{PARENT_ID}-01"})
    logger.warning("ready after %d s", 3, extra={"reason": "redis"})
    span.end(200)
    (line,) = log_lines()
    assert list(line)[:5] == ["timestamp", "level", "service", "traceId", "message"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", line.pop("timestamp"))
    assert re.fullmatch("[0-9a-f]{16}", line["spanId"])
    assert line.pop("spanId") != PARENT_ID
    assert line == {
        "level": "WARNING",
        "service": "kuaishang",
        "traceId": TRACE_ID,
        "message": "ready after 3 s",
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
    secret = "9f86d081884c7d659a2feaa0c55ad015"
    try:
        try:
            raise KeyError(f"the cause of {secret}")
        except KeyError as cause:
            raise ValueError("the effect") from cause
    except ValueError:
        logger.exception("it failed")
    (line,) = log_lines()
    assert line["message"] == "it failed"
    assert (line["exceptionType"], line["exceptionMessage"]) == ("ValueError", "the effect")
    frame = r'  File "[^"]+", line \d+, in test_an_exception_has.*\n    raise ValueError\("the effect"\) from cause\n'
    assert re.search(
        rf"KeyError: 'the cause of {HIDDEN}'\n.*{frame}.*ValueError: the effect\n$", line["stack"], re.DOTALL
    )


class Raises(Exception):
    def __str__(self) -> str:
        raise RuntimeError("hunter2")


MANY_CAUSES: BaseException = ValueError("the first")
for _ in range(2000):
    MANY_CAUSES, cause = ValueError("the last"), MANY_CAUSES
    MANY_CAUSES.__cause__ = cause


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (Raises(), "<exception str() failed>"),
        (ExceptionGroup("some", [ValueError("the first"), KeyError("the second")]), "KeyError: 'the second'"),
        (MANY_CAUSES, "ValueError: the last"),
    ],
    ids=["raises", "is a group", "has many causes"],
)
def test_the_line_of_any_exception_is_written(log_lines: Lines, error: BaseException, shown: str) -> None:
    logger.error("it failed", exc_info=error)
    (line,) = log_lines()
    assert shown in line["stack"]
    assert len(line["stack"]) <= 10_000
    assert "hunter2" not in str(line)


@pytest.mark.parametrize(
    "extra",
    [{"orderId": 7}, {"reason": {"nested": "mapping"}}, {"status": "not a number"}, {"code": True}],
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


class Pipe:
    """A handler that writes to a pipe, which nobody reads until `read`."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.handler = LineHandler(JsonLineFormatter("here", "0"))

    def log(self, message: str, **attributes: Any) -> None:
        self.handler.handle(logging.makeLogRecord({"msg": message, **attributes}))

    def read(self) -> list[dict[str, Any]]:
        """Read all that is written until a flush."""
        with ThreadPoolExecutor(1) as pool, os.fdopen(self.reader, encoding="utf-8") as stream:
            lines = pool.submit(lambda: [json.loads(line) for line in stream])
            self.handler.flush()
            os.close(self.writer)
            return lines.result()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    pipe = Pipe()
    monkeypatch.setattr(logs, "STDOUT", pipe.writer)
    yield pipe
    for descriptor in (pipe.reader, pipe.writer):
        with suppress(OSError):
            os.close(descriptor)
    time.sleep(3 * logs.GATHER_SECONDS)  # until its thread has noticed


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a process this machine may be busy."""
    monkeypatch.setattr(logs, "FLUSH_SECONDS", WAIT_SECONDS)


@pytest.mark.usefixtures("patient")
def test_without_a_reader_nobody_waits_and_dropped_lines_are_counted(pipe: Pipe) -> None:
    before = counted("log_lines_dropped_total")
    sent = 2 * CAPACITY + 3000  # one part waits in the queue, one with the thread
    for number in range(sent):  # without end, if a line waited for the reader
        pipe.log(f"line number {number}")
    dropped = counted("log_lines_dropped_total") - before
    assert dropped >= 2000
    assert len(pipe.read()) == sent - dropped


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("blocking", [True, False])
def test_queued_lines_are_written_at_the_end(pipe: Pipe, blocking: bool) -> None:
    os.set_blocking(pipe.writer, blocking)
    for number in range(1000):
        pipe.log(f"line number {number}, which is long enough to fill a pipe together with all the others")
    assert [line["message"].split(",")[0] for line in pipe.read()] == [
        f"line number {number}" for number in range(1000)
    ]


def test_the_end_waits_only_so_long_for_a_reader_and_counts_what_is_lost(pipe: Pipe) -> None:
    before = counted("log_lines_dropped_total")
    for _ in range(50):
        pipe.log("a line that is long enough to fill a pipe together with all the others " * 50)
    pipe.handler.flush()  # without end, if it waited for the reader
    assert counted("log_lines_dropped_total") - before == 50


def test_lines_for_a_reader_that_is_gone_count_as_dropped(pipe: Pipe) -> None:
    before = counted("log_lines_dropped_total")
    os.close(pipe.reader)
    pipe.log("for nobody")
    wait_until(lambda: pipe.handler.lost)
    pipe.log("counts it")
    assert counted("log_lines_dropped_total") == before + 1


def test_of_a_line_that_cannot_be_formatted_the_place_is_logged(
    pipe: Pipe, log_lines: Lines, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe.log("%d of %d", args=("hunter2",), filename="place.py", lineno=7)
    pipe.log("ready", name="\ud800", filename="place_of_another.py", lineno=9)
    pipe.log("the next one")
    assert [line["message"] for line in pipe.read()] == ["the next one"]
    assert {line["message"] for line in log_lines()} == {"a line cannot be formatted"}
    assert [line["reason"] for line in log_lines()] == ["place.py:7", "place_of_another.py:9"]
    assert "hunter2" not in str(capfd.readouterr())


def test_long_lines_of_several_processes_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    monkeypatch.setattr(logs, "STDOUT", writer)
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 60)  # they wait for the reader, and then for one another
    handler = LineHandler(JsonLineFormatter("here", "0"))
    children = []
    for name in "abcd":
        child = os.fork()
        if not child:
            try:
                handler.start()  # `configure` registers that
                for _ in range(50):
                    error = ValueError(f"{name * 9} " * 2000)
                    handler.handle(logging.makeLogRecord({"msg": name * 15, "exc_info": (ValueError, error, None)}))
                handler.flush()
            finally:
                os._exit(0)
        children.append(child)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    for child in children:
        os.waitpid(child, 0)
    assert len(lines) == 200
    assert all(set(line["exceptionMessage"]) == {line["message"][0], " ", HIDDEN} for line in lines)


def requests_in(lines: Path) -> int:
    return lines.read_bytes().count(b'"message":"request"')


def test_a_reader_of_stdout_that_stops_stops_no_worker(start_service: Callable[..., Service], tmp_path: Path) -> None:
    pipe, lines = tmp_path / "pipe", tmp_path / "lines"
    os.mkfifo(pipe)
    # Both ends are held by the reader, so that the service may open it at once.
    reader = subprocess.Popen([*bound_to_this_process(), "sh", "-c", f"exec cat <>{pipe} >{lines}"])
    try:
        wait_until(lines.exists)
        service = start_service(
            "tests.apps.faulty_route", within=["sh", "-c", f'exec "$@" >{pipe}', "sh"], WEB_CONCURRENCY="2"
        )
        suspend(reader)
        # More than the queues of both workers hold, so that each has a thread that waits for the pipe or for the other.
        for _ in range(8):
            requests.get(f"{service.url}/faulty/chatty/{CAPACITY}", timeout=WAIT_SECONDS)
        for _ in range(20):
            assert requests.get(f"{service.url}/livez", timeout=5).status_code == 200
        scraped = requests.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text
        assert float(re.findall(r"^kuaishang_log_lines_dropped_total (.*)", scraped, re.MULTILINE)[0]) > CAPACITY
        reader.send_signal(signal.SIGCONT)
        wait_until(lambda: requests_in(lines))
        before = requests_in(lines)
        wait_until(lambda: requests.get(f"{service.url}/livez", timeout=5) and requests_in(lines) > before)
    finally:
        reader.kill()
        reader.wait()


def test_a_full_disk_drops_lines_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    before = counted("log_lines_dropped_total")
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(logs, "STDOUT", full.fileno())
        handler = LineHandler(JsonLineFormatter("here", "0"))
        for _ in range(3):
            handler.handle(logging.makeLogRecord({"msg": "for nobody"}))
        wait_until(lambda: handler.lost)
        handler.handle(logging.makeLogRecord({"msg": "counts them"}))
        assert counted("log_lines_dropped_total") == before + 3
        time.sleep(3 * logs.GATHER_SECONDS)  # until its thread has noticed


def test_nothing_is_bound_outside_of_a_request(log_lines: Lines) -> None:
    logs.bind(userId=7)
    logger.warning("of nobody")
    assert "userId" not in log_lines()[0]
    assert logs.request_fields.get(None) is None


def test_the_exception_that_ends_a_process_is_a_line_and_not_on_stderr() -> None:
    code = "from telemetry import logs; logs.configure('INFO', 'here', '0'); 1 / 0"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert (ended.returncode, ended.stderr) == (1, "")
    line = json.loads(ended.stdout)
    assert (line["level"], line["message"], line["exceptionType"]) == ("CRITICAL", "uncaught", "ZeroDivisionError")
    assert "stack" in line


FORK = """
import logging, os, warnings
from telemetry import logs
logs.configure("INFO", "here", "0")
warnings.simplefilter("ignore")  # from Python 3.12 on a fork beside threads is warned of
logging.info("before")
child = os.fork()
logging.info("after")
if child:
    os.waitpid(child, 0)
"""


def test_a_forked_process_writes_its_own_lines_and_none_of_its_parents() -> None:
    ended = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert sorted(line["message"] for line in lines) == ["after", "after", "before"]
    assert len({line["pid"] for line in lines if line["message"] == "after"}) == 2
