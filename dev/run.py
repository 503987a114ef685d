"""The launcher behind `make run`: the service with code reload, and stand-ins for whatever is not configured.

Reads the service's settings (settings.py), of which HOST is 127.0.0.1 by default, and SIMULATOR_PORT and LOG_FORMAT.
Keeps its data under `--var`, including the service's log lines in `log/<port>.jsonl`. Prints the log lines on stdout
and its own messages on stderr.
"""

import argparse
import base64
import fcntl
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, NamedTuple, cast

import requests

from dev import log_reader
from dev.redis_server import RedisServer

ROOT = Path(__file__).resolve().parent.parent
LOCALHOST = "127.0.0.1"
LOCALHOST_OF_ALL = {"0.0.0.0": LOCALHOST, "::": "::1"}
"""Where this machine itself reaches a service that listens on all interfaces."""
SIMULATED_ACCOUNT = {
    "WECHAT_APP_ID": "wx0123456789abcdef",
    "WECHAT_APP_SECRET": "simulated",
    "WECHAT_ACCOUNT_APP_ID": "wxacc0123456789ab",
    "WECHAT_ACCOUNT_APP_SECRET": "simulated",
    "WECHAT_WEBSITE_APP_ID": "wxweb0123456789ab",
    "WECHAT_WEBSITE_APP_SECRET": "simulated",
}
NAME, TRACE = "make run", "make trace ID=…"
SERVICE = ["dev.reload", "--fd", "{fd}"]
"""The module that serves on a listening socket, with its arguments. `kuaishang demo` sets these three otherwise."""
STOP_SECONDS = 5
LOG_BYTES, LOG_FILES = 10 * 1024 * 1024, 5

signals: list[int] = []
"""Signals received that ask to stop; a plain list, as a signal handler must not take the lock of an Event."""


def fail(line: str) -> SystemExit:
    """An exit with one line on stderr and a status other than 0."""
    return SystemExit(f"{NAME}: {line}")


def say(words: str) -> None:
    """Print to stderr, if anybody still reads it."""
    with suppress(OSError):
        print(words, file=sys.stderr, flush=True)


class Stopped(Exception):
    """A signal asked to stop."""


class Part:
    """A process that the launcher starts, watches and stops.

    :param url: where it responds when it has started.
    :param read: called in a thread with the stdout of each start, reads it to the end; without it, stdout is inherited.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        env: dict[str, str],
        url: str,
        inherited: Sequence[int] = (),
        read: Callable[[IO[bytes]], None] | None = None,
    ) -> None:
        self.name = name
        self._url = url
        self._command = [sys.executable, "-m", *command]
        self._env = env
        self._inherited = inherited
        self._read = read
        self._reader: threading.Thread | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # A session of its own: Ctrl-C reaches the launcher alone, which then stops all parts in order.
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._read else None,
            start_new_session=True,
            pass_fds=self._inherited,
        )
        if self._read:
            self._reader = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
            self._reader.start()

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait(self) -> None:
        """Wait until it responds.

        :raises SystemExit: if it ends instead.
        """
        while self.running():
            with suppress(requests.RequestException):
                if requests.get(self._url, timeout=1).ok:
                    return
            pause()
        raise fail(f"{self.name} did not start; see its output above")

    def start_again(self) -> None:
        self.stop()  # what it has left behind
        self.start()
        self.wait()

    def stop(self) -> None:
        """End it and all processes that it started, and wait until its output is read."""
        if self.process is None:
            return
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._reader:
            self._reader.join(STOP_SECONDS)


class Watched(NamedTuple):
    """What is started again if it ends."""

    name: str
    running: Callable[[], bool]
    start: Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve on this machine; Ctrl-C stops everything.")
    parser.add_argument("--var", type=Path, default=ROOT / "var", help="where to keep data and secrets")
    var: Path = parser.parse_args().var.resolve()
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _: signals.append(number))
    for name in ("NO_PROXY", "no_proxy"):  # a proxy to the internet does not lead here
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), LOCALHOST, os.environ.get("HOST"), "::1"]))
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")  # no line may end the reading
    with ExitStack() as stack, suppress(Stopped):
        launch(var, {name: value for name, value in os.environ.items() if value.strip()}, stack)


def launch(var: Path, env: dict[str, str], stack: ExitStack) -> None:
    """Start what the environment does not configure, then the service, and watch them until a signal.

    :param env: the configuration; missing settings are added to it.
    :param stack: receives what to stop at the end.
    """
    show = log_format(env.get("LOG_FORMAT", "text"))
    env["ENV_FILE"] = os.devnull  # settings for production do not mix with stand-ins
    var.mkdir(parents=True, exist_ok=True)
    var.chmod(0o700)  # also one that exists: secrets, personal data and logs are in it
    host = env.setdefault("HOST", LOCALHOST)
    door = stack.enter_context(listen("PORT", env.setdefault("PORT", "8000"), host))
    port = door.getsockname()[1]
    env["PORT"] = str(port)
    local = LOCALHOST_OF_ALL.get(host, host)
    url = f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"
    simulator_url = None
    watched: list[Watched] = []
    parts: list[Part] = []

    lock = lock_folder(var, stack) if {"REDIS_URL", "DATABASE_URL"} - env.keys() else None
    if lock and "REDIS_URL" not in env:
        env["REDIS_URL"] = start_redis(var / "redis", lock, stack, watched)
    if "DATABASE_URL" not in env:
        env["DATABASE_URL"] = f"sqlite:///{var / 'kuaishang.db'}"
    if "WECHAT_APP_ID" not in env:
        for name in sorted(env.keys() & {*SIMULATED_ACCOUNT, "WECHAT_API_BASE_URL", "WECHAT_OPEN_BASE_URL"}):
            raise fail(f"{name} is set and WECHAT_APP_ID is not; set both for a real account, or none to simulate one")
        parts.append(simulator(env, url, stack))
        simulator_url = env["WECHAT_API_BASE_URL"]
    for name, value in kept_secrets(var).items():
        env.setdefault(name, value)
    env.setdefault("DOCS", "1")
    env.setdefault("DRAIN_SECONDS", "0")  # there is no load balancer to notice the stop

    path = var / "log" / f"{port}.jsonl"
    log = stack.enter_context(closing(log_file(path)))
    parts.append(
        Part(
            "the service",
            [word.format(fd=door.fileno()) for word in SERVICE],
            env,
            f"{url}/livez",
            inherited=[door.fileno()],
            read=partial(relay, log=log, show=show),
        )
    )
    for part in parts:
        stack.callback(part.stop)
        part.start()
    for part in parts:
        part.wait()
        watched.append(Watched(part.name, part.running, part.start_again))
    say(banner(url, simulator_url, env["REDIS_URL"], env["DATABASE_URL"], path))
    while True:
        pause()
        for name, running, start in watched:
            if not running():
                say(f"{NAME}: {name} has died; starting it again")
                start()


def log_format(name: str) -> Callable[[str], str]:
    """Return the function that formats a log line.

    :raises SystemExit: if the format is unknown.
    """
    if name == "json":
        return str
    if name == "text":
        return partial(log_reader.readable, colour=log_reader.wants_colour(sys.stdout))
    raise fail(f"LOG_FORMAT={name} is neither text nor json")


def log_file(path: Path) -> RotatingFileHandler:
    """Open the rotating log: at most LOG_FILES files of LOG_BYTES."""
    path.parent.mkdir(exist_ok=True)
    return RotatingFileHandler(
        path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8", errors="surrogateescape"
    )


def relay(lines: IO[bytes], log: RotatingFileHandler, show: Callable[[str], str]) -> None:
    """Write each line to the log file unchanged, then print it, to the end of the stream."""
    with lines:
        for line in lines:
            text = line.decode(errors="surrogateescape").removesuffix("\n")
            log.handle(logging.makeLogRecord({"msg": text}))
            with suppress(OSError):  # nobody reads it any more
                sys.stdout.write(f"{show(text)}\n")
                sys.stdout.flush()


def listen(name: str, value: str, host: str = LOCALHOST) -> socket.socket:
    """Listen on a port of an address of this machine.

    :raises SystemExit: if it is not a port, or taken, or the address is not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(value)))
        listener.listen()
    except (ValueError, OverflowError):
        listener.close()
        raise fail(f"{name}={value} is not a port number") from None
    except OSError as error:
        listener.close()
        where, other = f"port {value}", "another port"
        if host != LOCALHOST:
            where, other = f"{where} of HOST={host}", f"{other}, or HOST to an address of this machine"
        raise fail(f"{where} cannot be used ({error.strerror}); set {name} to {other}") from None
    return listener


def lock_folder(var: Path, stack: ExitStack) -> IO[bytes]:
    """Lock this folder, so that no other launcher keeps data in it.

    :raises SystemExit: if another one does.
    """
    lock = stack.enter_context((var / "lock").open("wb"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise fail(f"{var} is in use by another {NAME}; set REDIS_URL and DATABASE_URL to run beside it") from None
    return lock


def start_redis(data: Path, lock: IO[bytes], stack: ExitStack, watched: list[Watched]) -> str:
    """Start a private redis-server and return its URL, with more patience than in production."""
    redis = RedisServer(data)

    def start() -> None:
        try:
            redis.start(inherited=[lock.fileno()])  # the folder stays locked while Redis runs, even if we die
        except (OSError, RuntimeError) as error:
            raise fail(str(error)) from None

    stack.callback(redis.close)
    start()
    watched.append(Watched("Redis", redis.running, start))
    return f"{redis.url}?socket_timeout=5&socket_connect_timeout=5"  # a laptop may be busy


def simulator(env: dict[str, str], service_url: str, stack: ExitStack) -> Part:
    """Return the WeChat simulator, and point it and the service at each other."""
    wanted = env.get("SIMULATOR_PORT")
    try:
        listener = listen("SIMULATOR_PORT", wanted or "8001")
    except SystemExit:
        if wanted:
            raise
        listener = listen("SIMULATOR_PORT", "0")  # the usual port is taken
    stack.enter_context(listener)
    url = f"http://{LOCALHOST}:{listener.getsockname()[1]}"
    if "WECHAT_PUSH_TOKEN" not in env:  # a configured token without a key means plain messages
        env.update(WECHAT_PUSH_TOKEN="simulated", WECHAT_PUSH_AES_KEY="simulated".ljust(43, "A"))
    env.update(SIMULATED_ACCOUNT, WECHAT_API_BASE_URL=url, WECHAT_OPEN_BASE_URL=url, SIMULATOR_URL=url)
    return Part(
        "the WeChat simulator",
        ["dev.wechat_simulator", "--fd", str(listener.fileno())]
        + ["--app-id", env["WECHAT_APP_ID"], "--app-secret", env["WECHAT_APP_SECRET"]]
        + ["--web-app", f"{env['WECHAT_ACCOUNT_APP_ID']}:{env['WECHAT_ACCOUNT_APP_SECRET']}"]
        + ["--web-app", f"{env['WECHAT_WEBSITE_APP_ID']}:{env['WECHAT_WEBSITE_APP_SECRET']}"]
        + ["--push-token", env["WECHAT_PUSH_TOKEN"], "--push-aes-key", env.get("WECHAT_PUSH_AES_KEY", "")]
        + ["--push-url", f"{service_url}/api/v1/wechat/messages"],
        env,
        f"{url}/simulator/calls",
        inherited=[listener.fileno()],
    )


def kept_secrets(var: Path) -> dict[str, str]:
    """Read the secrets of this folder, and create them the first time."""
    path = var / "secrets.env"
    if not path.exists():
        made = {name: base64.b64encode(secrets.token_bytes(32)).decode() for name in ("SECRET_KEY", "ENCRYPTION_KEYS")}
        draft = var / f"secrets.{os.getpid()}"
        with open(draft, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.writelines(f"{name}={value}\n" for name, value in made.items())
        with suppress(FileExistsError):  # another launcher was faster: use its secrets
            os.link(draft, path)
        draft.unlink()
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def pause() -> None:
    time.sleep(0.2)
    if signals:
        raise Stopped


def banner(url: str, simulator_url: str | None, redis_url: str, database_url: str, log: Path) -> str:
    """Return the addresses, and how to log in from another terminal."""
    where = {"API": url, "Docs": f"{url}/docs", "WeChat": simulator_url or "the account of WECHAT_APP_ID"}
    if simulator_url:
        where["Web login"] = f"{url}/api/v1/auth/wechat/authorize?return_to=/docs"
    where |= {"Redis": without_password(redis_url), "Database": without_password(database_url)}
    where["Logs"] = f"{log}; {TRACE} prints all lines of an X-Trace-Id"
    lines = ["", "快上 Kuaishang is up; Ctrl-C stops everything.", ""]
    lines += [f"  {name:10}{place}" for name, place in where.items()]
    if simulator_url:
        lines += ["", "Log in, in another terminal:", ""]
        lines += ["export no_proxy=127.0.0.1"] if os.environ.keys() & {"http_proxy", "all_proxy", "ALL_PROXY"} else []
        lines += [login_to_paste(url, simulator_url)]
    return "\n".join([*lines, ""])


def without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def login_to_paste(url: str, simulator_url: str) -> str:
    """Return shell commands that log in as a new user and get that user; they need curl and sed."""
    return "\n".join(
        [
            f"""code=$(curl -s -X POST {simulator_url}/simulator/codes | sed 's/.*"code": *"\\([^"]*\\)".*/\\1/')""",
            f"""answer=$(curl -s {url}/api/v1/auth/wechat -H 'Content-Type: application/json' """
            """-d "{\\"code\\": \\"$code\\"}"); echo "$answer\"""",
            """token=$(echo "$answer" | sed 's/.*"token": *"\\([^"]*\\)".*/\\1/')""",
            f"""curl -s {url}/api/v1/users/me -H "Authorization: Bearer $token\"""",
        ]
    )


if __name__ == "__main__":
    main()
