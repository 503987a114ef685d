"""gunicorn's configuration of a generation of dev/reload.py: gunicorn.conf.py, except that it hands over at once."""

import os
import signal
from contextlib import suppress
from typing import Any

import gevent

from deploy.patch import generation
from deploy.patch.generation import production

globals().update({name: value for name, value in production.items() if not name.startswith("__")})
post_fork = generation.post_fork

preload_app = True  # in the master, where a fault ends the start; and a worker that is replaced runs the same code
loglevel = "warning"
graceful_timeout = production["settings"]["REQUEST_SECONDS"]  # which a new generation does not wait for


class Worker(generation.Worker):
    """Also ends connections that are kept when it is asked to stop."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn(self.notify)  # which ends them


worker_class = Worker


def when_ready(server: Any) -> None:
    production["when_ready"](server)
    signal.alarm(0)


def post_worker_init(worker: Any) -> None:
    production["post_worker_init"](worker)
    with suppress(OSError):  # a later one, and nobody waits for it
        os.write(int(os.environ["READY_PIPE"]), b"ready")
