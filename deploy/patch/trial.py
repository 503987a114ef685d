"""Start a worker of the code in this folder, apart from those that serve, and let it make a first request to itself.

    python -P deploy/patch/trial.py ADDRESSES [gunicorn's arguments]

gunicorn.conf.py runs this before a reload, as gunicorn stops the server if a new worker does not start. Ends with 0 if
the worker can serve; else says on stderr what is wrong and where.

ADDRESSES are those of the workers that serve: if Redis or the database is away, the new one need not be ready either.
Other addresses must be free. The trial listens nowhere, counts in no metric, and takes no message that was pushed.
"""

import ast
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

START_SECONDS = int(os.environ.get("START_SECONDS", 20))
"""How long it may take."""
MEMORY_BYTES = int(os.environ.get("MEMORY_MB", 1024)) * 1024**2
"""What it may have; more is a MemoryError, and the machine stays alive."""

MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"


class Refused(Exception):
    """It starts, and cannot serve."""


class Hangs(SystemExit):
    """It does not serve in time. A SystemExit, which gevent raises where the process waits."""


def give_up(number: int, frame: object) -> None:
    raise Hangs(f"it hangs: no response within {START_SECONDS} s")


def try_out(folder: Path, addresses: list[Any]) -> NoReturn:
    """Be a worker until its first request is over. Leaves a file in the folder: `passed`, or `why` not."""
    os.setsid()  # what it starts will be ended, too
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(ValueError):  # there is a lower limit
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, limits[1]))
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(START_SECONDS)
    try:
        serve_a_request(folder, addresses)
        (folder / "passed").touch()
    except BaseException as error:  # noqa: BLE001  whatever it is
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        (folder / "why").write_text(describe(error))
    os._exit(0)


def serve_a_request(folder: Path, addresses: list[Any]) -> None:
    """Do what gunicorn does for a new worker, except that this one accepts no connection.

    :raises Refused: if the worker starts, and is not ready.
    """
    from gunicorn.app.wsgiapp import WSGIApplication  # type: ignore[import-untyped]
    from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]

    server = Arbiter(WSGIApplication())
    if server.cfg.address != addresses:
        require_free(server.cfg.address)
    os.environ[MULTIPROC_DIR] = str(folder)  # gunicorn.conf.py has named another one
    server.cfg.when_ready(server)
    worker = server.worker_class(1, os.getppid(), [], server.app, server.timeout / 2, server.cfg, server.log)
    started = server.cfg.post_worker_init

    def first_request(worker: Any) -> None:
        from flask import got_request_exception

        errors: list[BaseException] = []
        got_request_exception.connect(lambda _, exception: errors.append(exception), weak=False)
        worker.wsgi.extensions["messages"].start = lambda: None  # one that is taken waits long if this process is ended
        started(worker)
        responses = [worker.wsgi.test_client().get("/readyz") for _ in range(3)]  # Redis may be busy
        best = min(responses, key=lambda response: response.status_code)
        if best.status_code != 200 and not (best.status_code == 503 and are_unready(addresses)):
            cause = errors[-1] if errors else None
            raise Refused(f"its /readyz answers {best.status_code}: {best.text[:300].strip()}") from cause
        worker.alive = False

    server.cfg.set("post_worker_init", first_request)
    server.cfg.pre_fork(server, worker)
    server.cfg.post_fork(server, worker)
    worker.init_process()


def require_free(addresses: list[Any]) -> None:
    """Raise Refused unless gunicorn could listen there, which ends if it cannot."""
    for host, port in (address for address in addresses if isinstance(address, tuple)):
        try:
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        except OSError as error:
            raise Refused(f"it cannot listen at {host}, port {port}: {error.strerror}") from None


def are_unready(addresses: list[Any]) -> bool:
    """Ask the workers that serve, if they have an address: a host and a port, or a path."""
    for address in addresses[:1]:
        with suppress(OSError, TypeError), connect(address) as connection:
            connection.settimeout(5)
            connection.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            return b" 503 " in connection.recv(64)
    return False


def connect(address: Any) -> socket.socket:
    if not isinstance(address, str):
        return socket.create_connection(address, timeout=5)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def describe(error: BaseException) -> str:
    """Return what an error says and which line of this folder it comes from, then the stack."""
    if type(error) is SystemExit and error.__context__:  # as gunicorn ends where its configuration is broken
        error = error.__context__
    cause = error.__cause__ if isinstance(error, Refused) else error
    if cause is None:
        return str(error)
    frames = [(Path(frame.filename).resolve(), frame.lineno) for frame in traceback.extract_tb(cause.__traceback__)]
    if isinstance(cause, SyntaxError):
        frames.append((Path(cause.filename or "").resolve(), cause.lineno))
    here, itself = Path.cwd(), Path(__file__).resolve()
    ours = [
        f"{path.relative_to(here)}:{line}"
        for path, line in frames
        if path.is_relative_to(here) and path.is_file() and "site-packages" not in path.parts and path != itself
    ]
    words = [str(error)] if error is not cause else []
    words += [*ours[-1:], type(cause).__qualname__, str(cause)]
    stack = "".join(traceback.format_exception(cause, limit=-12, chain=False))
    redaction = sys.modules.get("telemetry.redaction")
    text = f"{': '.join(words)}\n{stack}"
    return redaction.scrub(text) if redaction else text


def main() -> None:
    addresses, sys.argv = ast.literal_eval(sys.argv[1]), ["gunicorn", *sys.argv[2:]]
    beside = os.path.dirname(os.environ.get(MULTIPROC_DIR, "")) or None  # the one place that can always be written to
    with tempfile.TemporaryDirectory(dir=beside) as name:
        folder = Path(name)
        worker = get_context("fork").Process(target=try_out, args=(folder, addresses))
        worker.start()
        worker.join(START_SECONDS + 2)
        why = f"it hangs: no response within {START_SECONDS} s, and it cannot be interrupted"
        if worker.exitcode is not None:
            why = f"it ended with status {worker.exitcode} and said nothing, as by os._exit, a signal, or a crash in C"
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
        if (folder / "why").exists():
            why = (folder / "why").read_text()
        if not (folder / "passed").exists():
            sys.exit(why)


if __name__ == "__main__":
    main()
