"""The code reload of `make run`: `python -m dev.reload --fd N` serves on a listening socket, and what is saved next.

It imports the libraries of the service once, and none of its code. For what is saved it forks a *generation*, which is
gunicorn's master: it imports the code and forks workers, which accept from the same socket. The generation before it
ends when the new one is ready, and serves on if there is a fault. A file that means the same as before, because only
comments or white space have changed, changes nothing. Migrations run before, if they have changed.
"""

# Before the libraries, as in gunicorn.conf.py. First the originals of what this process waits with: it has no
# greenlets, which each generation would inherit.
import os
from os import close, waitpid
from select import select
from time import sleep

from gevent import monkey
from gevent.os import fork_gevent

monkey.patch_all()

import argparse
import fcntl
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path
from traceback import TracebackException

import psutil

from dev.sources import MIGRATIONS, ROOT, Sources, changes, import_libraries, look, paths

START_SECONDS = 15
"""How long a generation may take to be ready."""
STOP_SECONDS = 2
"""How long requests in flight may take at a stop."""
POLL_SECONDS = 0.05
"""What two looks find the same is saved completely."""
READY = b"ready"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

signals: list[int] = []
"""Signals received that ask to stop."""


class StartTimeout(SystemExit):
    """A generation is not ready in time. A SystemExit, which gevent raises where the process waits."""


class Forked(BaseException):
    """In a new process: leaves what the old one was doing, for the work of the new one."""

    def __init__(self, work: Callable[[int], object], pipe: int) -> None:
        super().__init__()
        self.work, self.pipe = work, pipe


class Child:
    """A process that reports on a pipe that it is ready, or else why not.

    :param work: what it does; gets the pipe.
    :param seconds: how long it may take.
    """

    def __init__(self, work: Callable[[int], object], seconds: float = START_SECONDS + 5) -> None:
        self.began = time.monotonic()
        self.ends = self.began + seconds
        self.pipe, pipe = os.pipe()
        self.pid = fork_gevent()
        if not self.pid:
            close(self.pipe)
            raise Forked(work, pipe)
        close(pipe)
        self.said = b""

    def outcome(self) -> dict[str, str] | None:
        """Return the fault that keeps it from being ready, empty if it is ready; None as long as it starts."""
        is_late = time.monotonic() > self.ends  # looked at before what it may have said
        while select([self.pipe], [], [], 0)[0]:
            if not (part := os.read(self.pipe, 65536)):
                return json.loads(self.said or '{"exceptionMessage": "it ended; see its output above"}')  # type: ignore[no-any-return]
            self.said += part
            if self.said.startswith(READY):
                return {}
        return {"exceptionMessage": f"it is not ready after {START_SECONDS} s"} if is_late else None

    def running(self) -> bool:
        return waitpid(self.pid, os.WNOHANG) == (0, 0)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its workers."""
        process = psutil.Process(self.pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        waitpid(self.pid, 0)
        self.close()

    def close(self) -> None:
        """Wait for no more reports."""
        if self.pipe >= 0:
            close(self.pipe)
            self.pipe = -1


def serve(listener: int, pipe: int) -> None:
    """Be gunicorn's master."""
    from gunicorn.app.wsgiapp import run  # type: ignore[import-untyped]

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(START_SECONDS)  # until it is ready to fork workers
    os.environ["READY_PIPE"] = str(pipe)
    sys.argv = ["gunicorn", "dev.wsgi:app", "--config", "python:dev.generation", "--bind", f"fd://{listener}"]
    run()


def give_up(number: int, frame: object) -> None:
    raise StartTimeout(f"it is not ready after {START_SECONDS} s")


def migrate(pipe: int) -> None:
    """Bring the database's schema up to date."""
    from alembic import command
    from alembic.config import Config

    command.upgrade(Config(toml_file=ROOT / "pyproject.toml"), "head")
    os.write(pipe, READY)


def fault_of(error: BaseException) -> dict[str, str]:
    """Describe an error by the fields of a log line, and `place`, the line of the service that it comes from."""
    if type(error) is SystemExit and error.__context__:  # as gunicorn ends where its configuration is broken
        error = error.__context__
    shown = TracebackException.from_exception(error)
    served = {str(path) for path in paths()}
    ours = [number for number, frame in enumerate(shown.stack) if frame.filename in served]
    place, message = "", str(error).partition("\n(Background on")[0]
    if ours:
        place = f"{shown.stack[ours[-1]].filename}:{shown.stack[ours[-1]].lineno}"
        del shown.stack[: ours[0]]  # how gunicorn came there
    if isinstance(error, SyntaxError):
        place, message = f"{error.filename}:{error.lineno}", error.msg
    fault = {
        "place": place.removeprefix(f"{ROOT}/"),
        "exceptionType": type(error).__qualname__,
        "exceptionMessage": message,
    }
    return fault | {"stack": "".join(shown.format())[-10_000:]}


def report(what: str, fault: dict[str, str], serving: bool) -> None:
    """Say what is wrong on stderr, and in a line of the log."""
    place, kind = fault.pop("place", ""), fault.get("exceptionType", "")
    words = ": ".join(filter(None, [what, place, kind, fault["exceptionMessage"]]))
    state = "the old code keeps serving, and the next save is tried" if serving else "nothing serves"
    say(f"make run: {words}\nmake run: {state}")
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    line = {"timestamp": now, "level": "ERROR", "service": "kuaishang", "traceId": None}
    line |= {"message": f"{words} ({state})", **fault, "logger": "dev.reload"}
    line["instance"] = f"{socket.gethostname()}:{os.environ.get('PORT')}"
    with suppress(OSError):
        fcntl.lockf(1, fcntl.LOCK_EX)  # as telemetry/logs.py does: a pipe mixes long writes
        os.write(1, f"{json.dumps(line, ensure_ascii=False)}\n".encode(errors="replace"))
        fcntl.lockf(1, fcntl.LOCK_UN)


def say(words: str) -> None:
    with suppress(OSError):
        print(words, file=sys.stderr, flush=True)


class Reloader:
    """Keeps one generation serving, of what has been saved last and starts."""

    def __init__(self, listener: int) -> None:
        self.listener = listener
        self.seen = self.tried = look({})
        self.migrated: Sources = {}
        self.served: Sources = {}
        self.serving: Child | None = None
        self.starting: Child | None = None
        self.ending: list[Child] = []
        import_libraries(self.tried)
        self.try_what_is_saved(set())

    def start(self) -> None:
        self.starting = Child(partial(serve, self.listener))

    def step(self) -> None:
        """Take in what has been saved, how the newest generation gets on, and which have ended."""
        now = look(self.seen)
        settled, self.seen = now == self.seen, now
        if settled and (changed := changes(self.tried, now)):
            self.tried = now
            self.try_what_is_saved(changed)
        if self.starting and (fault := self.starting.outcome()) is not None:
            self.settle(self.starting, fault)
        self.ending = [child for child in self.ending if child.running()]
        if self.serving and not self.serving.running():
            say("make run: the service has died; starting it again")
            self.serving = None
            if not self.starting:
                self.start()

    def try_what_is_saved(self, changed: set[Path]) -> None:
        """Migrate, if migrations have changed, and begin a generation of the code.

        :param changed: the files that have changed since the last one was begun.
        """
        if self.starting:
            self.starting.kill()
            self.starting = None
        for path in changed:  # Python would take what was saved in the same second, with the same length, for the same
            Path(cache_from_source(str(path))).unlink(missing_ok=True)
        if any(MIGRATIONS in path.parents for path in changes(self.migrated, self.tried)):
            child = Child(migrate, seconds=math.inf)
            while (fault := child.outcome()) is None and not signals:
                sleep(POLL_SECONDS)
            child.kill()
            if fault:
                self.report("the database cannot be migrated", fault)
                return
            if self.migrated:
                say("make run: the database has all migrations")
            self.migrated = self.tried
        if not self.serving or any(MIGRATIONS not in path.parents for path in changes(self.served, self.tried)):
            self.start()
        else:
            say("make run: what is saved is what serves")

    def settle(self, child: Child, fault: dict[str, str]) -> None:
        """Let a generation serve that is ready, or report why it is not."""
        self.starting = None
        if fault:
            child.kill()
            self.report("the new code does not start", fault)
            return
        if self.serving:
            self.serving.terminate()
            self.ending.append(self.serving)
            names = sorted(str(path.relative_to(ROOT)) for path in changes(self.served, self.tried))
            say(f"make run: reloaded in {time.monotonic() - child.began:.1f} s: {', '.join(names)}")
        self.serving, self.served = child, self.tried
        child.close()

    def report(self, what: str, fault: dict[str, str]) -> None:
        """Say what is wrong, and end if nothing has served yet."""
        report(what, fault, bool(self.serving))
        if not self.served:
            raise SystemExit(1)

    def stop(self) -> None:
        """End all generations."""
        if self.starting:
            self.starting.kill()
        living = [*self.ending, *filter(None, [self.serving])]
        for child in living:
            child.terminate()
        ends = time.monotonic() + STOP_SECONDS
        while living and time.monotonic() < ends:
            sleep(POLL_SECONDS)
            living = [child for child in living if child.running()]
        for child in living:
            child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dev.reload", description="Serve what is saved.")
    parser.add_argument("--fd", type=int, required=True, help="a listening socket")
    listener = parser.parse_args().fd
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: signals.append(number))
    launcher = os.getppid()
    try:
        reloader = Reloader(listener)
        while not signals and os.getppid() == launcher:
            sleep(POLL_SECONDS)
            reloader.step()
        reloader.stop()
    except Forked as forked:
        work, pipe = forked.work, forked.pipe
    else:
        return
    master = os.getpid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    try:
        work(pipe)
    except BaseException as error:
        if os.getpid() == master and not (isinstance(error, SystemExit) and not error.code):
            with suppress(OSError):  # it was ready before
                os.write(pipe, json.dumps(fault_of(error)).encode())
            os._exit(1)
        raise  # a worker ends


if __name__ == "__main__":
    main()
