"""How gunicorn serves the application in production: `gunicorn wsgi:app`. Each setting with its reason.

The master imports nothing of ours: what it has imported, reloaded workers inherit, and a patch would not be read.
"""

# Before anything that could wait: whatever waits lets other requests of its process go on.
import gevent
from gevent import monkey

monkey.patch_all()
# Look-ups of names need no thread: of gevent's ten, a name server that hangs would take all, those of Redis too.
gevent.config.resolver = "ares"

import errno
import logging
import os
import resource
import runpy
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from subprocess import PIPE, Popen

import gevent.server
import gevent.socket
import gunicorn.util
from gunicorn.errors import HaltServer
from gunicorn.http.errors import LimitRequestHeaders, ParseException
from gunicorn.workers.ggevent import GeventWorker
from pythonjsonlogger.msgspec import MsgspecFormatter

# Refuse to start, here and once, if the environment lacks anything.
settings = runpy.run_path(str(Path(__file__).with_name("settings.py")))["load"]()

# All interfaces by default: the container or the machine's firewall decides who gets this far.
bind = f"[{settings['HOST']}]:{settings['PORT']}"  # the brackets, which IPv6 needs, gunicorn removes

# At least two processes, so that one that dies or reloads leaves another that serves.
workers = settings["WEB_CONCURRENCY"]

# Each request has a greenlet: one that waits for WeChat, Redis, the database or a slow client costs some 30 KB.
worker_connections = settings["WEB_CONNECTIONS"]
# Each needs a descriptor, and so may each call of WeChat.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


class Client(gevent.socket.socket):
    """A connection whose client has HEAD_SECONDS for a head, from its first byte, and BODY_SECONDS for the rest.

    A response leaves in as few parts as it has; the client takes each within BODY_SECONDS.
    """

    door = None  # of this process
    ends_at = 0.0  # of the head, or of the body; 0 while no request has begun
    idle = settings["HEAD_SECONDS"]  # how long it may take until a request begins
    since = 0.0  # when it began to be idle
    served = over = shut = False
    held = b""

    def recv(self, *args):  # type: ignore[no-untyped-def]
        while not self.over:
            self.settimeout(max(self.ends_at - time.monotonic(), 0.001) if self.ends_at else self.idle)
            self.door.in_flight -= self.served  # a request that waits for its client keeps no other one out
            try:
                data = super().recv(*args)
            except TimeoutError:
                self.over = True
                if self.served:
                    raise
                break
            finally:
                self.door.in_flight += self.served
            came, refusal = time.monotonic(), None if self.ends_at or not data else self.door.refusal(data)
            if refusal is None:
                self.ends_at = self.ends_at or came + settings["HEAD_SECONDS"]
                return data
            super().sendall(refusal)  # before anything is parsed, which costs more than all of this
            self.over = b"Connection: close" in refusal
        return b""

    def is_gone(self):  # type: ignore[no-untyped-def]
        """Whether the client has closed its connection, or has no more to send and what it sent is read."""
        self.settimeout(0)
        try:
            return not (self.shut or super().recv(1, gevent.socket.MSG_PEEK))
        except BlockingIOError:
            return False
        except OSError:
            return True

    def sendall(self, data, *args):  # type: ignore[no-untyped-def]
        data = self.held + data
        self.held = data if not self.held and data.startswith(b"HTTP/") else b""  # the body follows
        if data and not self.held:
            self.settimeout(settings["BODY_SECONDS"])
            try:
                super().sendall(data, *args)
            except TimeoutError:
                raise BrokenPipeError(errno.EPIPE, "nobody reads") from None

    def close(self):  # type: ignore[no-untyped-def]
        # Only when the client has read the response, or does not (RFC 9112, section 9.6).
        if self.fileno() >= 0:
            self.sendall(b"")
            gunicorn.util.close_graceful(gevent.socket.socket(fileno=self.detach()), max_drain=16 * 1024 * 1024)


class Worker(GeventWorker):
    """gunicorn's gevent worker, with clients that have to keep to a time."""

    clients: set[Client] = set()  # noqa: RUF012  of this process
    timeout_ctx = nullcontext  # a Client has its own

    def run(self):  # type: ignore[no-untyped-def]
        if settings["WECHAT_PUSH_TOKEN"]:
            self.wsgi.extensions["messages"].start()  # not before it may serve, which can be refused until here
        super().run()

    def handle(self, listener, client, addr):  # type: ignore[no-untyped-def]
        client = Client(client.family, client.type, client.proto, client.detach())
        client.since = time.monotonic()
        self.clients.add(client)
        try:
            super().handle(listener, client, addr)
        finally:
            self.clients.remove(client)

    def handle_request(self, listener_name, req, sock, addr):  # type: ignore[no-untyped-def]
        if sock.is_gone():  # nothing is begun for nobody
            raise StopIteration
        sock.began, sock.served = sock.ends_at - settings["HEAD_SECONDS"], True
        # Less than until its deadline: a client that is too slow gets 400.
        sock.ends_at = min(time.monotonic() + settings["BODY_SECONDS"], sock.began + settings["REQUEST_SECONDS"] - 0.2)
        super().handle_request(listener_name, req, sock, addr)
        sock.sendall(b"")  # a response without a body
        gevent.sleep(0)  # others go on now, even if this client's next request is there already
        sock.served, sock.idle = False, keepalive
        req.body.read()  # what is left of it, less than 64 KiB; the door would take it for the next request
        came, sock.since = req.unreader.buf.getvalue(), time.monotonic()  # of the next request
        sock.ends_at = sock.since + settings["HEAD_SECONDS"] if came else 0.0
        if came and (refusal := sock.door.refusal(came)):
            sock.sendall(refusal.replace(b": keep-alive", b": close"))
            raise StopIteration

    def notify(self):  # type: ignore[no-untyped-def]
        super().notify()  # once a second
        self.publish()
        with suppress(Exception), gevent.Timeout(1, False):  # what was off stays off, what was on stays on
            self.wsgi.extensions["switches"].read()
            self.wsgi.extensions["check_redis"]()  # which leaves a primary that was replaced, and would still be read
        a_while_ago = time.monotonic() - 1
        for client in [one for one in self.clients if not (self.alive or one.ends_at) and one.since < a_while_ago]:
            # gunicorn would wait for the next request until graceful_timeout. One that is on its way is served: what
            # has arrived is still read, which the client's own shutdown would prevent.
            with suppress(OSError), gevent.socket.fromfd(client.fileno(), client.family, client.type) as same:
                same.shutdown(gevent.socket.SHUT_RD)
                client.shut = True  # which is no sign that nobody waits for the response to what has arrived

    def handle_error(self, req, client, addr, exc):  # type: ignore[no-untyped-def]
        # What gunicorn refuses it quotes, however long it is.
        if isinstance(exc, ParseException):
            vars(exc).update({name: value[:100] for name, value in vars(exc).items() if isinstance(value, str | bytes)})
        super().handle_error(req, client, addr, exc)


def write_error(client, status, reason, message):  # type: ignore[no-untyped-def]
    """Refuse in the envelope what is no HTTP, or too long; gunicorn would in HTML. Its own line says why."""
    from werkzeug.exceptions import default_exceptions

    from errors import code_and_message, envelope  # in a worker: see above

    trace_id = secrets.token_hex(16)
    logging.getLogger("gunicorn.error").warning("refused with %s %s", status, reason, extra={"traceId": trace_id})
    code, text = code_and_message(default_exceptions[status]())
    body = envelope(code, None, text)
    head = f"HTTP/1.1 {status} {reason}\r\nX-Trace-Id: {trace_id}\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    gunicorn.util.write_nonblock(client, head.encode() + body)


gunicorn.util.write_error = write_error

# Measured beside gunicorn's threads, with gunicorn-h1c and hiredis as here: one worker on one core, 32 connections.
#   CPU µs a request: probe, read, login, order, list    logins that wait 3 s for WeChat, of 2,000; a read beside them
#   gthread, 16       215   572   1965   2711   1273     144 served, the others hang; 29 s, or none
#   gthread, 1,000                                       1,216 served in 12 s, the others refused after 7 s; 6.6 s
#   gevent            202   321   1732   1700   1075     1,000 served in 5 s, the others refused in 0.3 s; 5 ms
# With threads each wait costs the lock of the interpreter, and 72 KB for a login, not 30.
worker_class = Worker
# How many clients are let in before others go on. gunicorn would take one if there are several workers (see
# post_worker_init): in an overload they would wait for seconds, unseen, in front of the door.
gevent.server.StreamServer.max_accept = 16


def pre_request(worker, req):  # type: ignore[no-untyped-def]
    headers = dict(req.headers)
    if sum(len(name) + len(value) for name, value in req.headers) > MAXIMUM_HEADERS:
        raise LimitRequestHeaders(f"more than {MAXIMUM_HEADERS} bytes")
    # A response may come before the body is read. gunicorn drops less than 64 KiB of it; for more, or if it is unknown
    # whether it comes, the response says that the connection closes. Otherwise the next request on it would be lost.
    if int(headers.get("CONTENT-LENGTH", 0)) >= 65536 or headers.keys() & {"TRANSFER-ENCODING", "EXPECT"}:
        req.force_close()


# Which proxies may say where the service is, TRUSTED_PROXIES says: gunicorn's own list knows of no client's address and
# of no host. Trusted, SCRIPT_NAME would lead past a proxy's rules for paths, and contradictory schemes would be a 400.
# Nobody is believed, so gunicorn need not compare addresses.
forwarder_headers = ""
forwarded_allow_ips = "*"
secure_scheme_headers = {}  # type: ignore[var-annotated]

# All of a request's headers together; each may have 8190 bytes, as cookies need.
MAXIMUM_HEADERS = 32 * 1024

# A worker that gives no sign of life for this long is replaced: it computes without end, or waits for something that
# holds up all greenlets. A slow request is no reason: it waits in its own.
timeout = 30

# How long requests in flight may take to finish at a stop; with the drain less than 30 s, when platforms kill.
graceful_timeout = 28 - settings["DRAIN_SECONDS"]

# Longer than the 60 s for which load balancers usually keep an idle connection, so that they close first
# and never send a request into a connection that is being closed.
keepalive = 75

# The heartbeat file in memory: on a slow disk a healthy worker would be taken for dead. It takes no room but an inode.
shm = "/dev/shm"
worker_tmp_dir = shm if os.access(shm, os.W_OK) and os.statvfs(shm).f_favail else tempfile.gettempdir()

# The metrics of the workers are in a directory of this master. A stop removes it; what a crash left tells the next
# start at this address of it. prometheus_client reads this variable when it is first imported.
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"
directories = f"kuaishang-{settings['HOST']}-{settings['INSTANCE']}"  # with the machine: containers share memory
directory_of_master = f"{worker_tmp_dir}/{directories}-{os.getpid()}-"
if not os.environ.get(MULTIPROC_DIR, "").startswith(directory_of_master):  # a reload keeps it
    os.environ[MULTIPROC_DIR] = directory_of_master + secrets.token_hex(8)

# A file leaves as any other body does, after the head that a Client holds back; sendfile(2) would overtake it.
sendfile = False

# No socket in the home directory through which the server could be steered.
control_socket_disable = True

# gunicorn's own lines are JSON on stdout, with the fields of the service's. The access log is the service's own; with
# logconfig_dict gunicorn would put together a line of its own for each request, even if no logger wrote it.
accesslog = errorlog = None
loglevel = settings["LOG_LEVEL"].lower()

lines = logging.StreamHandler(sys.stdout)
# A line is dropped rather than wait for a reader that does not read: the master must always be able to stop.
lines.addFilter(lambda record: bool(select.select([], [sys.stdout], [], 0)[1]))
columns = ("levelname", "message", "name", "process")
renamed = {"levelname": "level", "name": "logger", "process": "pid", "exc_info": "stack"}
# They come first, in this order.
first = {"timestamp": None, "levelname": None, "service": "kuaishang", "traceId": None, "message": None}
last = {"instance": settings["INSTANCE"], "version": settings["VERSION"]}
lines.setFormatter(MsgspecFormatter(columns, rename_fields=renamed, defaults=first, static_fields=last, timestamp=True))
logging.getLogger("gunicorn.error").handlers = [lines]


# By which it is told to stop.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def when_ready(server):  # type: ignore[no-untyped-def]
    # Once, and only when the port is ours: neither a reload nor a start that fails comes here.
    server.started, server.after, server.deaths = time.time(), "stop", 0
    for left in Path(worker_tmp_dir).glob(f"{directories}-*"):
        if not Path("/proc", left.name.split("-")[-2]).exists():  # other masters still count in theirs
            server.after = "crash"
            shutil.rmtree(left, ignore_errors=True)
    server.handle_hup, server.handle_term = lambda: reload_what_serves(server), lambda: drain(server)


def reload_what_serves(server):  # type: ignore[no-untyped-def]
    """Reload what is there now if a worker of it, tried apart, can serve; if not, gunicorn would stop the server."""
    flag = Path(os.environ[MULTIPROC_DIR], "reload-refused")
    command = [sys.executable, "-m", "deploy.patch.trial", repr(server.LISTENERS[0].getsockname()), bind]
    try:
        seconds = 3 * int(os.environ.get("START_SECONDS", 20))  # if it does not keep to its own limits, which are less
        trial = Popen(command, cwd=server.cfg.chdir, stderr=PIPE, preexec_fn=lambda: signal.alarm(seconds))  # noqa: S603
        for number in STOPS:  # which do not wait for it
            signal.signal(number, lambda number, frame: trial.kill() or server.signal(number, frame))
        said = trial.communicate()[1].decode(errors="replace").strip()[-4000:]
        reason = trial.returncode and (said or f"it ended with status {trial.returncode}")
    except (OSError, ValueError) as error:
        reason = error
    if reason:
        with suppress(OSError):
            flag.touch()
        server.log.error("reload refused: %s", reason)
    else:
        flag.unlink(missing_ok=True)
        server.reload()


def pre_fork(server, worker):  # type: ignore[no-untyped-def]
    # Also for a later worker: systemd empties /dev/shm when a user logs out, and at the start there may be no room.
    with suppress(OSError):
        os.mkdir(os.environ[MULTIPROC_DIR], 0o700)
    # Deaths are counted by the next worker that starts: the master itself counts nothing.
    worker.replaces, server.deaths = server.deaths, 0


def post_fork(server, worker):  # type: ignore[no-untyped-def]
    # Until gunicorn sets a worker's handlers, a signal ends it: the master's, which it has inherited, would ignore it.
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    # One that cannot start beside others, as the tree is broken by now, must not make gunicorn stop the server.
    worker.booted, worker.wsgi = bool(server.WORKERS), None
    logging.getLogger().addHandler(lines)  # until the service is loaded: there may be no room for metrics
    from telemetry import logs, metrics, multiprocess, redaction

    multiprocess.place_waiting()
    redaction.hide_settings(settings)
    # An exception at start-up is redacted.
    lines.setFormatter(logs.JsonLineFormatter(settings["INSTANCE"], settings["VERSION"]))
    worker.publish = metrics.publish
    metrics.SAMPLED[metrics.CONNECTIONS] = lambda: len(worker.clients)
    metrics.CONNECTIONS_LIMIT.set(worker_connections)
    metrics.WORKER_STARTS.inc()
    metrics.WORKER_DEATHS.inc(worker.replaces)
    metrics.SAMPLED[metrics.RELOAD_REFUSED] = Path(os.environ[MULTIPROC_DIR], "reload-refused").exists
    metrics.START_TIME.labels(server.after).set(server.started)


def post_worker_init(worker):  # type: ignore[no-untyped-def]
    worker.cfg.set("workers", 1)  # which is true of this process, and leaves max_accept as it is
    # The service is loaded: from now on its handler writes gunicorn's lines, redacted.
    worker.log.error_log.handlers, worker.log.error_log.propagate = [], True
    Client.door = worker.wsgi.extensions["door"]
    Client.door.start(worker.clients)
    worker.notify()  # which reads what is switched off, before the first request
    from storage import failures

    try:
        worker.wsgi.extensions["check_redis"]()
    except failures.CLUSTER:
        raise RuntimeError("REDIS_URL names a Redis Cluster: use a single Redis, or Sentinel") from None
    except Exception:  # noqa: BLE001, S110  which may pass
        pass


def worker_exit(server, worker):  # type: ignore[no-untyped-def]
    if worker.wsgi:
        worker.wsgi.extensions["messages"].stop()


def child_exit(server, worker):  # type: ignore[no-untyped-def]
    # The arbiter retires only workers it has already replaced, so a missing one has died. Before a stop a service
    # manager may signal all processes at once.
    if len(server.WORKERS) < server.num_workers and not Path(os.environ[MULTIPROC_DIR], "stopping").exists():
        server.deaths += 1
        if not Path(os.environ[MULTIPROC_DIR], f"counter_{worker.pid}.db").exists():
            server.deaths += worker.replaces  # it died before it could count them
    with suppress(Exception):  # numbers that are lost must not stop the server
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)  # counters of dead workers are kept, a few KiB each


def on_exit(server):  # type: ignore[no-untyped-def]
    # Because a worker could not start is a crash too.
    if not isinstance(sys.exc_info()[1], HaltServer):
        shutil.rmtree(os.environ[MULTIPROC_DIR], ignore_errors=True)


def drain(server):  # type: ignore[no-untyped-def]
    """Go on as before for DRAIN_SECONDS, while /readyz answers 503, and stop then, or at a second SIGTERM."""
    del server.handle_term  # which uncovers gunicorn's own
    if not (server.num_workers and settings["DRAIN_SECONDS"]):  # it has none if the supervisor has replaced this one
        server.handle_term()  # raises StopIteration: the stop begins now
    with suppress(OSError):  # without a directory /readyz cannot know, and it stops all the same
        Path(os.environ[MULTIPROC_DIR], "stopping").touch()
    server.log.info("/readyz answers 503 from now on; the stop begins in %s s", settings["DRAIN_SECONDS"])
    signal.signal(signal.SIGALRM, lambda number, frame: server.signal(signal.SIGTERM, frame))
    signal.setitimer(signal.ITIMER_REAL, settings["DRAIN_SECONDS"])
