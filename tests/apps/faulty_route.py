"""The service with routes that fail, though no dependency does: `gunicorn tests.apps.faulty_route:app`."""

import logging
import threading
import time
import warnings
from collections.abc import Iterator

from wsgi import app

__all__ = ["app"]


@app.get("/faulty/crash")
def crash() -> None:
    raise ZeroDivisionError


@app.get("/faulty/body")
def break_in_the_body() -> Iterator[str]:
    """Flask has finished by then, so gunicorn handles the exception."""
    yield str(1 // 0)


@app.get("/faulty/slow/<float:seconds>")
def be_slow(seconds: float) -> str:
    time.sleep(seconds)
    return "at last"


@app.get("/faulty/chatty/<int:lines>")
def be_chatty(lines: int) -> str:
    for _ in range(lines):
        logging.getLogger(__name__).info("chatter")
    return "enough"


@app.get("/faulty/thread")
def let_a_thread_die() -> str:
    threading.Thread(target=crash).start()
    return "on its way"


@app.get("/faulty/finalizer")
def fail_in_a_finalizer() -> str:
    type("Fragile", (), {"__del__": lambda self: crash()})()
    return "gone"


@app.get("/faulty/warning")
def warn() -> str:
    warnings.warn("this will not do", stacklevel=1)
    return "beware"


@app.get("/faulty/spin")
def spin() -> None:
    while True:
        pass


@app.get("/faulty/compute/<float:seconds>")
def compute(seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return "at last"


@app.get("/faulty/allocate")
def allocate() -> str:
    return str(len(bytes(1 << 30)))
