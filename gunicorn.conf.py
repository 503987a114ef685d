"""How gunicorn serves the application in production: `gunicorn wsgi:app`. Each setting with its reason."""

import json
import os
import runpy
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import gunicorn.glogging
import gunicorn.workers.gthread

from telemetry import instance_directory

# Refuse to start, here and once, if the environment lacks anything. Not imported: what the master imports its workers
# inherit, and a patched settings.py would then not be read at a reload.
declared = runpy.run_path(str(Path(__file__).with_name("settings.py")))
settings = declared["load"](os.environ)

# All interfaces: the container or the machine's firewall decides who gets this far.
bind = f"0.0.0.0:{settings['PORT']}"

# Two processes at the least, so that one that dies or reloads leaves another that serves.
workers = settings["WEB_CONCURRENCY"]

# Requests wait for WeChat, Redis and the database, not for the CPU; threads wait cheaply. They also wait for clients
# that send slowly, and without a limit: a proxy that buffers requests belongs in front.
threads = settings["WEB_THREADS"]

# A worker whose main thread gives no sign of life for this long is replaced. A slow request is no reason: it has a
# thread of its own, and its waits for WeChat, Redis and the database end by themselves.
timeout = 30

# How long requests in hand may take to finish at a stop; with the drain under the 30 s after which most platforms kill.
graceful_timeout = 28 - settings["DRAIN_SECONDS"]

# Longer than the 60 s for which load balancers usually keep an idle connection, so that they close first
# and never send a request into a connection that is being closed.
keepalive = 75

# The heartbeat file in memory: on a slow disk a healthy worker would be taken for dead.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None

# The access log is the service's own, one JSON line a request.
accesslog = None
loglevel = settings["LOG_LEVEL"].lower()


class logger_class(gunicorn.glogging.Logger):  # noqa: N801  gunicorn's name for the setting
    """gunicorn's own lines have the shape of the service's."""

    def setup(self, cfg):  # type: ignore[no-untyped-def]
        from telemetry import logs, redaction

        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        redaction.hide_settings(settings)
        logs.configure(settings["LOG_LEVEL"], declared["instance"](settings["PORT"]), declared["VERSION"])


class worker_class(gunicorn.workers.gthread.ThreadWorker):  # noqa: N801  gunicorn's name for the setting
    """Threads; and what gunicorn answers by itself is in the envelope too, with the trace id of the line about it."""

    def handle_error(self, req, client, addr, exc):  # type: ignore[no-untyped-def]
        try:
            # Here and not above, where it would be the master that imports them.
            from werkzeug.datastructures import Headers

            from telemetry.traces import RequestSpan

            span = RequestSpan("OTHER", None, Headers())
        except Exception:  # whatever it is, gunicorn can do without
            self.log.exception("What gunicorn answers has no trace id")
            super().handle_error(req, client, addr, exc)
            return
        enveloping = EnvelopingSocket(client, span.trace_id, self.log)
        try:
            super().handle_error(req, enveloping, addr, exc)
        finally:
            with suppress(Exception):  # the answer is on its way
                span.end(enveloping.status)


class EnvelopingSocket:
    """The client's socket, for an answer of gunicorn's own, of which only the status line is kept."""

    def __init__(self, client, trace_id, log):  # type: ignore[no-untyped-def]
        self.status = 500
        self._client, self._trace_id, self.log = client, trace_id, log

    def __getattr__(self, name):  # type: ignore[no-untyped-def]
        return getattr(self._client, name)

    def sendall(self, answer):  # type: ignore[no-untyped-def]
        try:
            answer = self._enveloped(answer)
        except Exception:  # whatever it is, gunicorn's answer is better than none
            self.log.exception("What gunicorn answers is not in the envelope")
        self._client.sendall(answer)

    def _enveloped(self, answer):  # type: ignore[no-untyped-def]
        status_line = answer.partition(b"\r\n")[0].decode()
        self.status = int(status_line.split()[1])
        import errors

        body = json.dumps(errors.envelope_of_refusal(self.status), ensure_ascii=False, separators=(",", ":")).encode()
        head = (
            status_line,
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"X-Trace-Id: {self._trace_id}",
        )
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def post_fork(server, worker):  # type: ignore[no-untyped-def]
    # Until it serves, it may die of a SIGTERM: the master's handler, which it has inherited, would not hear it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A worker reads the telemetry anew, as it does all else of ours: it may have been patched since the master read it.
    for name in [name for name in sys.modules if name.partition(".")[0] == "telemetry"]:
        del sys.modules[name]
    from telemetry import metrics

    metrics.WORKER_STARTS.inc()
    metrics.WORKER_DEATHS.inc(worker.replaces)
    metrics.START_TIME.set(server.started)


def when_ready(server):  # type: ignore[no-untyped-def]
    # Once, and only when the port is ours: neither a reload nor a start that fails comes here.
    instance_directory.make(server.cfg.uid, server.cfg.gid)
    server.started = time.time()
    if settings["DRAIN_SECONDS"]:
        server.handle_term = partial(drain, server)


def pre_fork(server, worker):  # type: ignore[no-untyped-def]
    instance_directory.ensure(server.cfg.uid, server.cfg.gid)
    # The dead are counted by the next one that starts: the master itself counts nothing.
    worker.replaces = vars(server).pop("deaths", 0)


def child_exit(server, worker):  # type: ignore[no-untyped-def]
    # The master dismisses only whom it has replaced already, so a place that is empty now was left by one that died.
    # Before a stop it may be a service manager that signals all processes at once.
    if len(server.WORKERS) < server.num_workers and not instance_directory.is_stopping():
        server.deaths = vars(server).get("deaths", 0) + 1
    try:
        instance_directory.fold(worker.pid)
    except Exception:  # whatever it is, numbers that are lost must not stop the server
        server.log.exception("What a worker had counted is lost (pid:%s)", worker.pid)


def on_exit(server):  # type: ignore[no-untyped-def]
    instance_directory.remove()


def drain(server):  # type: ignore[no-untyped-def]
    """Go on as before for DRAIN_SECONDS, while /readyz answers 503, and stop then, or at a second SIGTERM."""
    del server.handle_term  # the next one is gunicorn's own
    server.maybe_promote_master()  # it looks once a second
    if server.reexec_pid or server.master_pid:  # after a USR2 another master serves on the same port
        server.handle_term()
    with suppress(OSError):  # without a directory nobody can be told, and it stops all the same
        instance_directory.announce_stop()
    server.log.info("/readyz answers 503 from now on; the stop begins in %s s", settings["DRAIN_SECONDS"])
    signal.signal(signal.SIGALRM, lambda number, frame: server.signal(signal.SIGTERM, frame))
    signal.setitimer(signal.ITIMER_REAL, settings["DRAIN_SECONDS"])


# No socket in the home directory through which the server could be steered.
control_socket_disable = True
