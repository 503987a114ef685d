"""Log lines: one JSON object each, on stdout, with the trace id of the request that they belong to.

`fields.py` declares the fields of a line, `redaction.py` hides what its texts must not show. Lines wait in a bounded
queue for a thread that writes them: no request waits for the reader of stdout. It is a thread of the operating system
also where gevent makes greenlets of all others: one that waited for a pipe, a disk or a lock of another process would
stop all requests of its worker. So it touches nothing that greenlets wait for, such as metrics, locks and loggers.
"""

import fcntl
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from traceback import TracebackException
from typing import Any

import msgspec
from gevent import monkey

from telemetry import metrics, traces
from telemetry.fields import FIELDS, SERVICE
from telemetry.redaction import scrub

STDOUT = 1
CAPACITY = 5000
"""Lines that may wait to be written; those that come then are dropped and counted."""
GATHER_SECONDS = 0.1
"""For how long lines are gathered before they are written: a thread that wakes up takes the GIL from requests."""
FLUSH_SECONDS = 2
"""How long the end of the process waits for lines to be written."""

logger = logging.getLogger(__name__)
# Its warnings quote callers' headers, a malformed OTEL_EXPORTER_OTLP_HEADERS, and each retry; giving up is an error.
logging.getLogger("opentelemetry").setLevel(logging.ERROR)
request_fields: ContextVar[dict[str, Any]] = ContextVar("request_fields")
"""The fields of every line of a request: method, route, ids, and the user once known. Not set outside of a request."""

_NUMBERS: dict[str, tuple[type, ...]] = {"long": (int,), "float": (int, float), "boolean": (bool,)}
_OF_ANY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def bind(**fields: Any) -> None:
    """Add fields, such as the user, to all further lines of this request and of the work that it begins.

    In place: `access_log` holds the same dict for the request's own line.
    """
    request_fields.get({}).update(fields)


class JsonLineFormatter(logging.Formatter):
    """Formats a record as a line with the declared fields.

    :param instance: which of the processes that serve behind one address, such as host:port.
    :param version: of the service.
    """

    def __init__(self, instance: str, version: str) -> None:
        super().__init__()
        self._of_process = {"instance": instance, "version": version}

    def encode(self, level: int, name: str, message: str, fields: dict[str, Any], at: float | None = None) -> str:
        """Return the line with these fields, which are not checked.

        :param name: of the logger.
        :param at: seconds since 1970; by default now.
        """
        moment, word = datetime.fromtimestamp(at or time.time(), UTC), logging.getLevelName(level)
        line = {"timestamp": moment, "level": word, "service": SERVICE, "traceId": None, "message": message, **fields}
        return msgspec.json.encode({**line, **self._of_process, "logger": name, "pid": os.getpid()}).decode()

    def format(self, record: logging.LogRecord) -> str:
        line = request_fields.get({}) | traces.current_ids()
        for name in vars(record).keys() - _OF_ANY_RECORD:
            extra = getattr(record, name)
            several = isinstance(extra, list | tuple)
            hide = str if name == "traceId" else scrub  # a trace id looks like a secret
            values = [hide(one) if isinstance(one, str) else one for one in (extra if several else [extra])]
            if name in FIELDS and all(type(one) in _NUMBERS.get(FIELDS[name], (str,)) for one in values):
                line[name] = values if several else values[0]
            elif extra is not None:
                line.setdefault("undeclared", []).append(scrub(name))
        if record.exc_info and (error := record.exc_info[1]) is not None:
            shown = TracebackException.from_exception(error)
            line["exceptionType"] = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
            line["exceptionMessage"] = scrub(str(shown))  # also if it has none
            # As Python prints it: lines of code as they are, messages redacted.
            stack = "".join(part if part.startswith('  File "') else scrub(part) for part in shown.format())
            line["stack"] = stack[-10_000:]
        return self.encode(record.levelno, record.name, scrub(record.getMessage()), line, record.created)


class LineHandler(logging.Handler):
    """Puts lines into a queue, from which a thread of its own writes them."""

    def __init__(self, formatter: JsonLineFormatter) -> None:
        super().__init__()
        self.formatter: JsonLineFormatter = formatter
        self.start()

    def start(self) -> None:
        """Begin with an empty queue and a new thread; threads do not survive a fork."""
        # What is done with them is atomic: a garbage collection may log while a line is put.
        self.lines: deque[bytes] = deque()
        self.lost: deque[int] = deque()
        monkey.get_original("_thread", "start_new_thread")(self._write_lines, ())

    def handle(self, record: logging.LogRecord) -> bool:
        """Put a line; without the lock of other handlers, as nothing here needs one."""
        self.put(f"{record.filename}:{record.lineno}", self.format, record)
        return True

    def put(self, source: str, encode: Callable[..., str], *args: Any) -> None:
        """Put the line that `encode` returns of these arguments, or another if it cannot.

        :param source: where in the code it comes from.
        """
        try:
            if len(self.lines) < CAPACITY:
                self.lines.append(f"{encode(*args)}\n".encode())
            else:
                self.lost.append(1)
        except Exception:  # noqa: BLE001  not by logging's own handleError, which prints all the arguments
            logger.error("a line cannot be formatted", extra={"reason": source})
        while self.lost:
            metrics.LINES_DROPPED.inc(self.lost.popleft())

    def flush(self) -> None:
        """Wait until the lines so far are written, FLUSH_SECONDS at most; `logging` does so as the process ends."""
        ends = time.monotonic() + FLUSH_SECONDS
        while self.lines and time.monotonic() < ends:
            time.sleep(0.005)
        metrics.LINES_DROPPED.inc(len(self.lines))

    def _write_lines(self) -> None:
        """Write what comes within GATHER_SECONDS at once."""
        while True:
            monkey.get_original("time", "sleep")(GATHER_SECONDS)
            if lines := self.lines.copy():
                try:
                    _write(b"".join(lines))
                except OSError:  # nobody reads any more, or the disk is full
                    self.lost.append(len(lines))
                for _ in lines:
                    self.lines.popleft()


def _write(lines: bytes) -> None:
    fcntl.lockf(STDOUT, fcntl.LOCK_EX)  # the processes of an instance share a pipe, which mixes long writes
    try:
        while lines:
            monkey.get_original("select", "select")([], [STDOUT], [])  # the pipe may be one that does not block
            lines = lines[os.write(STDOUT, lines) :]
    finally:
        fcntl.lockf(STDOUT, fcntl.LOCK_UN)


def write_request(level: int, name: str, fields: dict[str, Any]) -> None:
    """Write the line of a request; a LogRecord would double its price.

    :param level: one of the logging module.
    :param name: of the logger.
    """
    for handler in logging.root.handlers:
        if isinstance(handler, LineHandler):
            handler.put(name, handler.formatter.encode, level, name, "request", fields)


def configure(level: str, instance: str, version: str) -> None:
    """Write all lines of at least this level to stdout, and whatever Python would print on stderr.

    :param level: the name of a level of the logging module.
    :param instance: see JsonLineFormatter.
    :param version: see JsonLineFormatter.
    """
    handler = LineHandler(JsonLineFormatter(instance, version))
    os.register_at_fork(after_in_child=handler.start)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # No line has these, and each costs a little of every line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: logger.critical("uncaught", exc_info=(kind, error, trace))
    sys.unraisablehook = lambda args: logger.error("ignored", exc_info=args.exc_value)
    threading.excepthook = lambda args: logger.critical("uncaught in a thread", exc_info=args.exc_value)
