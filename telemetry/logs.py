"""Log lines: one JSON object each, on stdout, with the trace id of the request they belong to.

`FIELDS` says what a line may hold; `redaction` sees to what its texts must not. Lines are written by a thread, so that
nobody waits for whoever reads them.
"""

import fcntl
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, cast

import msgspec

from telemetry import traces
from telemetry.fields import FIELDS
from telemetry.redaction import scrub, scrub_named

SERVICE = "kuaishang"
STDOUT = 1
CAPACITY = 10_000
"""Lines that may wait to be written; what comes then is dropped, and counted."""
GATHER_SECONDS = 0.1
"""For how long lines are gathered before they are written: each time the thread wakes up, a request is in its way."""
BATCH_LINES = 1000
FLUSH_SECONDS = 2
"""How long the end of the process waits for lines to be written."""
LONG_BYTES = 4096
"""Of longer lines, with a stack, only a tenth as many may wait."""
STACK_CHARACTERS = 16_000
CAUSES = 10

logger = logging.getLogger(__name__)
request_fields: ContextVar[dict[str, Any]] = ContextVar("request_fields", default={})  # noqa: B039  never written to
"""What every line of a request says beside its own fields: method, route, and who is asking once that is known."""

_BLANK = vars(logging.makeLogRecord({}))
_ATTRIBUTES = len(_BLANK)
"""Of every record; those that the caller gave come after them."""
_OF_OTHER_FORMATTERS = {"message", "asctime"}
_NUMBERS: dict[str, tuple[type, ...]] = {"integer": (int,), "long": (int,), "float": (int, float), "boolean": (bool,)}
_MAXIMA = {"integer": 2**31 - 1, "long": 2**63 - 1}


def bind(user_id: int) -> None:
    """Say whose request this is, in all lines that it, and what it begins, will write."""
    request_fields.set({**request_fields.get(), "userId": user_id})


class RequestRecord(logging.LogRecord):
    """What is logged of a request: all that its line says, so that it can be formatted later and elsewhere.

    As each request has one, it is made without what no line says, as by which line of code.

    :param name: the logger's.
    :param ids: the trace id and the span id of the request.
    :param fields: those of `FIELDS` that this line has beside those of all lines of the request.
    """

    def __init__(self, name: str, level: int, ids: tuple[str, str], fields: dict[str, Any]) -> None:
        vars(self).update(_BLANK)
        self.name, self.levelno, self.levelname, self.msg = name, level, logging.getLevelName(level), "request"
        self.created = time.time()
        self.ids = ids
        self.fields = request_fields.get() | fields


class JsonLineFormatter(logging.Formatter):
    """Makes of a record a line with `FIELDS`.

    :param instance: which of the processes that serve behind one address, such as host:port.
    :param version: of the service.
    """

    def __init__(self, instance: str, version: str) -> None:
        super().__init__()
        self._of_every_line = {"instance": instance, "version": version}

    def format(self, record: logging.LogRecord) -> str:
        ids: tuple[str | None, str | None]
        if isinstance(record, RequestRecord):
            ids, message, fields = record.ids, record.msg, record.fields
        else:
            ids, message, fields = traces.ids(), _message(record), request_fields.get() | _extra(record)
            if parent_id := traces.parent_id():
                fields = {"parentSpanId": parent_id} | fields | {"parentSpanId": parent_id}
            error = record.exc_info[1] if record.exc_info else None
            if error is not None:
                fields |= {"exceptionType": _name(error), "exceptionMessage": _said(error), "stack": _stack(error)}
        line = {
            "timestamp": f"{_second(int(record.created))}.{int(record.created % 1 * 1000):03}Z",
            "level": record.levelname,
            "service": SERVICE,
            "traceId": ids[0],
            "message": message,
        }
        if ids[1]:
            line["spanId"] = ids[1]
        line |= fields
        if "userId" in line:
            line["userId"] = line.pop("userId")  # after what the line itself says
        line |= self._of_every_line
        line |= {"logger": record.name, "pid": os.getpid()}
        return msgspec.json.encode(line).decode()


@lru_cache(2)
def _second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _message(record: logging.LogRecord) -> str:
    """The message; whatever of it does not stand in the source code is scrubbed."""
    template = str(record.msg)
    if not _stands_in_the_source(record):
        template = scrub(template)
    try:
        if not record.args:
            return template
        if isinstance(record.args, Mapping):
            return scrub_named(template % {name: _shown(arg) for name, arg in record.args.items()})
        return scrub_named(template % tuple(_shown(arg) for arg in record.args))
    except Exception as error:  # noqa: BLE001  too many or too few, %d for what is not shown, or a broken __str__
        return f"{template} ({type(error).__name__} in its arguments)"


def _stands_in_the_source(record: logging.LogRecord) -> bool:
    """Whether the message is a constant of the function that logs it, and so was not put together from anything."""
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        if frame.f_code.co_filename == record.pathname and frame.f_code.co_name == record.funcName:
            return isinstance(record.msg, str) and record.msg in frame.f_code.co_consts
    return False


def _shown(arg: object) -> object:
    if arg is None or type(arg) is bool or (type(arg) in (int, float) and abs(cast(float, arg)) < 10_000_000):
        return arg
    return scrub(str(arg))


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """The fields that the caller gave, if they are declared and of their declared types."""
    extra: dict[str, Any] = {}
    undeclared = []
    for name, value in islice(vars(record).items(), _ATTRIBUTES, None):
        if value is None or name in _OF_OTHER_FORMATTERS:
            continue
        declared = FIELDS.get(name, "")
        if isinstance(value, str) and declared in ("keyword", "text"):
            extra[name] = scrub(value)
        elif isinstance(value, list | tuple) and declared == "keyword":
            extra[name] = [scrub(str(part)) for part in value]
        elif type(value) in _NUMBERS.get(declared, ()) and abs(value) <= _MAXIMA.get(declared, value):
            extra[name] = value
        else:
            undeclared.append(scrub(name))
    if undeclared:
        extra["undeclared"] = undeclared
    return extra


def _name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _said(error: BaseException) -> str:
    """Its message, and its notes."""
    try:
        return scrub("\n".join([str(error), *map(str, getattr(error, "__notes__", ()))]))
    except Exception as broken:  # noqa: BLE001  its __str__ fails, and the stack is wanted all the same
        return f"({_name(broken)} in its __str__)"


def _stack(error: BaseException) -> str:
    """As Python prints it, causes first, but with messages that are fit to be written."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < CAUSES:
        inner = [f"  {_name(one)}: {_said(one)}\n" for one in getattr(cause, "exceptions", ())[:CAUSES]]  # of a group
        frames = "".join(traceback.format_tb(cause.__traceback__))
        if isinstance(cause, SyntaxError):
            frames += scrub("".join(traceback.format_exception_only(cause)[:-1]))  # the line of code that is meant
        parts.append(f"{frames}{_name(cause)}: {_said(cause)}\n{''.join(inner)}")
        context = None if cause.__suppress_context__ else cause.__context__
        cause = context if cause.__cause__ is None else cause.__cause__
    return "\n".join(reversed(parts))[-STACK_CHARACTERS:]


class QueuedHandler(logging.Handler):
    """Writes lines to a file descriptor in a thread.

    :param drop: called for each line that finds the queue full.
    """

    def __init__(self, formatter: JsonLineFormatter, drop: Callable[[], None], descriptor: int) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._drop = drop
        self._descriptor = descriptor
        self.start()

    def createLock(self) -> None:  # noqa: N802
        self.lock = None  # the queue is safe by itself

    def start(self) -> None:
        """Begin with an empty queue and a thread of this process."""
        self._queue: SimpleQueue[bytes | RequestRecord | None] = SimpleQueue()
        self._dropped = 0
        self._writing = 0
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if not self._has_room(CAPACITY):
            return
        if isinstance(record, RequestRecord):
            self._queue.put(record)  # one after the other, the thread formats them in a fraction of the time
            return
        line = self._formatted(record)
        if len(line) <= LONG_BYTES or self._has_room(CAPACITY // 10):
            self._queue.put(line)

    def _has_room(self, capacity: int) -> bool:
        """Whether fewer lines than that wait; counts the line that is dropped if not."""
        if self._queue.qsize() < capacity:
            return True
        self._dropped += 1
        self._drop()
        return False

    def _formatted(self, record: logging.LogRecord) -> bytes:
        try:
            return self.format(record).encode() + b"\n"
        except Exception as error:  # noqa: BLE001  logging itself would print it, with all arguments, or the thread end
            reason = f"{_name(error)} at {os.path.basename(record.pathname)}:{record.lineno}"
            return self._line("ERROR", "a line cannot be written", reason=reason)

    def close(self) -> None:
        """Write what waits, for FLUSH_SECONDS at the most; what is lost then is counted."""
        if self._closed:  # the logging module closes once more what was closed
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(FLUSH_SECONDS)
        if self._thread.is_alive():
            with suppress(Empty):
                while True:
                    self._writing += self._queue.get_nowait() is not None
            for _ in range(self._writing):
                self._drop()
        super().close()

    def _write_all(self) -> None:
        closing = False
        while not closing:
            batch = [self._queue.get()]
            time.sleep(GATHER_SECONDS)
            while len(batch) < BATCH_LINES and not self._queue.empty():
                batch.append(self._queue.get())
            closing = None in batch
            lines = [line if isinstance(line, bytes) else self._formatted(line) for line in batch if line is not None]
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                lines.append(self._line("WARNING", "log lines were dropped", dropped=dropped))
            self._writing = len(lines)
            try:
                if lines:
                    self._write(b"".join(lines))
                self._writing = 0
            except OSError:  # nobody reads any more
                for _ in lines:
                    self._drop()

    def _write(self, batch: bytes) -> None:
        # The other processes write to the same pipe, which by itself keeps no more than 4 KiB together.
        with suppress(OSError):
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            rest = memoryview(batch)
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:
                    select.select([], [self._descriptor], [])
        finally:
            with suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def _line(self, level: str, message: str, **fields: Any) -> bytes:
        """A line of this handler's own."""
        record = logging.makeLogRecord({"name": __name__, "levelname": level, "msg": message, **fields})
        return self.format(record).encode() + b"\n"


_handler: QueuedHandler | None = None


def _start_again() -> None:
    """Threads do not come along into a forked process."""
    if _handler:
        _handler.start()


os.register_at_fork(after_in_child=_start_again)


def configure(level: str, instance: str, version: str, drop: Callable[[], None] = lambda: None) -> None:
    """Send every logger's lines of at least this level to stdout, and what would else be printed on stderr too.

    :param level: the name of a level of the logging module.
    :param instance: see JsonLineFormatter.
    :param version: see JsonLineFormatter.
    :param drop: called for each line that is lost.
    """
    global _handler
    _handler = QueuedHandler(JsonLineFormatter(instance, version), drop, STDOUT)
    logging.basicConfig(level=level, handlers=[_handler], force=True)  # closes those that were there
    # No line says these, and each costs a little of every line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: logger.critical("uncaught", exc_info=(kind, error, trace))
    sys.unraisablehook = lambda args: logger.error("ignored", exc_info=args.exc_value)
    threading.excepthook = lambda args: logger.critical("uncaught in a thread", exc_info=args.exc_value)
