"""gunicorn's configuration of a generation of dev/reload.py: gunicorn.conf.py, except that it hands over at once."""

import logging
import os
import runpy
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import gevent.server

production = runpy.run_path(str(Path(__file__).resolve().parent.parent / "gunicorn.conf.py"))
globals().update({name: value for name, value in production.items() if not name.startswith("__")})

preload_app = True  # in the master, where a fault ends the start; and a worker that is replaced runs the same code
loglevel = "warning"
graceful_timeout = production["settings"]["REQUEST_SECONDS"]  # which a new generation does not wait for


class Worker(production["Worker"]):  # type: ignore[misc,valid-type]
    """Leaves new connections to the new code when it is asked to stop; gunicorn looks once a second."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        gevent.server.StreamServer.max_accept = 0
        gevent.spawn(self.notify)  # which ends connections that are kept


worker_class = Worker


def when_ready(server: Any) -> None:
    production["when_ready"](server)
    signal.alarm(0)


def post_fork(server: Any, worker: Any) -> None:
    production["post_fork"](server, worker)
    logging.getLogger().removeHandler(production["lines"])  # the service is loaded already, and writes each line itself


def post_worker_init(worker: Any) -> None:
    production["post_worker_init"](worker)
    with suppress(OSError):  # a later one, and nobody waits for it
        os.write(int(os.environ["READY_PIPE"]), b"ready")
