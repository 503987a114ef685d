"""Log lines: one JSON object each, on stdout, with the trace id of the request that they belong to.

`fields.py` declares the fields of a line, `redaction.py` hides what its texts must not show. Lines wait in a bounded
queue for a thread that writes them: no request waits for the reader of stdout.
"""

import fcntl
import logging
import os
import select
import sys
import threading
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from queue import SimpleQueue
from traceback import TracebackException
from typing import Any

from pythonjsonlogger.msgspec import MsgspecFormatter

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
STACK_CHARACTERS = 10_000

logger = logging.getLogger(__name__)
# They quote callers' headers, a malformed OTEL_EXPORTER_OTLP_HEADERS, and each retry; giving up is an error.
for name in ("opentelemetry.trace", "opentelemetry.util.re", "opentelemetry.exporter"):
    logging.getLogger(name).setLevel(logging.ERROR)
request_fields: ContextVar[dict[str, Any]] = ContextVar("request_fields", default={})  # noqa: B039  never written to
"""The fields of every line of a request: method, route, and the user once known."""

_NUMBERS: dict[str, tuple[type, ...]] = {"long": (int,), "float": (int, float), "boolean": (bool,)}


def bind(**fields: Any) -> None:
    """Add fields, such as the user, to all further lines of this request and of the work that it begins."""
    request_fields.get().update(fields)


class JsonLineFormatter(MsgspecFormatter):
    """Formats a record as a line with the declared fields.

    :param instance: which of the processes that serve behind one address, such as host:port.
    :param version: of the service.
    """

    def __init__(self, instance: str, version: str) -> None:
        super().__init__(static_fields={"instance": instance, "version": version})
        self.reserved_attrs.add("context")

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["timestamp"] = datetime.fromtimestamp(record.created, UTC)
        log_data.update(level=record.levelname, service=SERVICE, traceId=None, message=scrub(record.message))
        log_data.update(vars(record).get("context") or request_fields.get() | traces.current_ids())
        for name in vars(record).keys() - self.reserved_attrs:
            extra = getattr(record, name)
            several = isinstance(extra, list | tuple)
            values = [scrub(one) if isinstance(one, str) else one for one in (extra if several else [extra])]
            if name in FIELDS and all(type(one) in _NUMBERS.get(FIELDS[name], (str,)) for one in values):
                log_data[name] = values if several else values[0]
            elif extra is not None:
                log_data.setdefault("undeclared", []).append(scrub(name))
        log_data.update(self.static_fields, logger=record.name, pid=os.getpid())
        if record.exc_info and (error := record.exc_info[1]) is not None:
            name = f"{type(error).__module__}.{type(error).__qualname__}"
            log_data["exceptionType"] = name.removeprefix("builtins.")
            log_data["exceptionMessage"] = scrub(str(TracebackException.from_exception(error)))  # also if it has none
            log_data["stack"] = message_dict["exc_info"]

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Format the stack as Python prints it: lines of code as they are, messages redacted."""
        parts = TracebackException.from_exception(ei[1]).format() if ei[1] is not None else ()
        return "".join(part if part.startswith('  File "') else scrub(part) for part in parts)[-STACK_CHARACTERS:]


class LineHandler(QueueHandler):
    """Puts records into a queue, from which a thread of its own takes them to write them."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(SimpleQueue())
        self.setFormatter(formatter)
        self.start()

    def start(self) -> None:
        """Begin with an empty queue and a new thread; threads do not survive a fork."""
        self.queue: SimpleQueue[Any] = SimpleQueue()  # reentrant: a garbage collection may log while a line is put
        threading.Thread(target=self._write_lines, daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() < CAPACITY:
            self.queue.put(record)
        else:
            metrics.LINES_DROPPED.inc()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Keep what may change until the record is formatted: the arguments and the context."""
        record.msg, record.args = record.getMessage(), ()
        record.context = request_fields.get() | traces.current_ids()
        return record

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Log the place of a line that cannot be formatted; logging's own prints the record with all its arguments."""
        logger.error("a line cannot be formatted", extra={"reason": f"{record.filename}:{record.lineno}"})

    def flush(self) -> None:
        """Wait until the lines so far are written, FLUSH_SECONDS at most; `logging` does so as the process ends."""
        written = threading.Event()
        self.queue.put(written)
        if not written.wait(FLUSH_SECONDS):
            metrics.LINES_DROPPED.inc(self.queue.qsize())

    def _write_lines(self) -> None:
        """Write what comes within GATHER_SECONDS at once, as each write lets a request wait; set events afterwards."""
        while True:
            first = self.queue.get()
            time.sleep(GATHER_SECONDS)
            queued = [first, *(self.queue.get() for _ in range(self.queue.qsize()))]
            records = [one for one in queued if isinstance(one, logging.LogRecord)]
            try:
                _write("".join(map(self._line, records)).encode())
            except OSError:  # nobody reads any more
                metrics.LINES_DROPPED.inc(len(records))
            for event in [one for one in queued if isinstance(one, threading.Event)]:
                event.set()

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return f"{self.format(record)}\n"
        except Exception:  # noqa: BLE001  the thread must go on
            self.handleError(record)
            return ""


def _write(lines: bytes) -> None:
    fcntl.lockf(STDOUT, fcntl.LOCK_EX)  # the processes of an instance share a pipe, which mixes long writes
    try:
        while lines:
            select.select([], [STDOUT], [])  # the pipe may be one that does not block
            lines = lines[os.write(STDOUT, lines) :]
    finally:
        fcntl.lockf(STDOUT, fcntl.LOCK_UN)


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
