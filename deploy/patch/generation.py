"""gunicorn's configuration of a generation: gunicorn.conf.py, and how it works with supervisor.py.

The supervisor holds the port and says by signals how many workers there are; on a pipe it hears what is ready.
"""

import logging
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import gevent
import gevent.server

production = runpy.run_path(str(Path(__file__).resolve().parents[2] / "gunicorn.conf.py"))
globals().update({name: value for name, value in production.items() if not name.startswith("__")})
if directory := os.environ.get("TRIAL_METRICS"):  # of trial.py, which is no instance of the service
    os.environ[production["MULTIPROC_DIR"]] = directory


class Worker(production["Worker"]):  # type: ignore[misc,valid-type]
    """Leaves new connections to others as soon as it is retired; gunicorn looks once a second."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        gevent.server.StreamServer.max_accept = 0


worker_class = Worker


def report(*words: Any) -> None:
    os.write(int(os.environ["SUPERVISOR_PIPE"]), f"{' '.join(map(str, words))}\n".encode())


def when_ready(server: Any) -> None:
    production["when_ready"](server)
    server.handle_hup = lambda: os.kill(os.getppid(), signal.SIGHUP)
    server.handle_ttin, server.handle_ttou = lambda: add_worker(server), lambda: retire_worker(server)
    try:
        server.app.wsgi()  # once for all workers, which share its memory
    except RuntimeError:
        traceback.print_exc()  # gunicorn would print the message alone
        sys.exit(1)
    settings = production["settings"]
    names = production["bind"], settings["INSTANCE"], settings["VERSION"]
    report("loaded", settings["WEB_CONCURRENCY"], os.environ[production["MULTIPROC_DIR"]], *names)


def add_worker(server: Any) -> None:
    server.num_workers += 1
    server.spawn_worker()  # at once: gunicorn would wait until those that it has retired have ended


def retire_worker(server: Any) -> None:
    server.num_workers -= 1  # to none, which gunicorn would not
    server.manage_workers()
    report("retired")


def post_fork(server: Any, worker: Any) -> None:
    production["post_fork"](server, worker)
    worker.booted = False  # if it cannot start, this generation ends
    logging.getLogger().removeHandler(production["lines"])  # the service is loaded already, and writes each line itself


def readiness(worker: Any) -> int:
    """Return the status of its /readyz; of the last of three, if Redis or the machine is busy for a second."""
    for pause in (0.5, 1, 0):
        status: int = worker.wsgi.test_client().get("/readyz").status_code
        if status == 200:
            break
        time.sleep(pause)
    return status


def post_worker_init(worker: Any) -> None:
    production["post_worker_init"](worker)
    report("ready", readiness(worker))
    if not os.read(int(os.environ["SUPERVISOR_GATE"]), 1):  # waits until that is good enough
        sys.exit()


def on_exit(server: Any) -> None:
    # Also if a worker could not start, which is no crash: the supervisor goes on without it.
    shutil.rmtree(os.environ[production["MULTIPROC_DIR"]], ignore_errors=True)
