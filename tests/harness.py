"""The programs that the tests run against, each in a process of its own, and how to control them."""

import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import requests
from alembic import command
from alembic.config import Config
from redis import Redis
from sqlalchemy import ColumnElement

from storage import message_queue
from storage.models import User
from telemetry import metrics

ROOT = Path(__file__).resolve().parent.parent
APP_ID, APP_SECRET = "wx0123456789abcdef", "an-app-secret-nobody-may-see"
WEB_APP_ID, WEB_APP_SECRET = "wxfedcba9876543210", "a-web-app-secret-nobody-may-see"
METRICS_TOKEN = "a-metrics-token-nobody=may-see"
PERSON = {
    "phone": "13812345678",
    "real_name": "欧阳锋",
    "id_card": "11010119491231002X",
    "email": "ouyang@example.com",
    "bank_card": "6222020200112230123",
}
"""Must not appear in full in a log line, in the database, or in a response unless documented."""

PUSH_TOKEN, PUSH_AES_KEY = "apushtokennobodymaysee", "aPushAesKeyNobodyMaySee012345678901234567ab"


WAIT_SECONDS = 60
"""How long to wait for what happens at once on a quiet machine."""
PORTS = range(10_000, 20_000)
"""Which are looked for. A node of a Redis Cluster listens 10,000 above its port too. Both are below those that the
kernel gives to connections, and nobody looks for the second."""


def bound_to_this_process(number: signal.Signals = signal.SIGKILL) -> list[str]:
    """Words before a command, so that its process gets this signal when ours dies, however it dies. Only on Linux."""
    return ["setpriv", "--pdeathsig", number.name.removeprefix("SIG")] if shutil.which("setpriv") else []


def wait_until(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """Poll until the condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        outcome = condition()
        if outcome:
            return outcome
        time.sleep(0.02)
    raise AssertionError(f"condition not met within {seconds} s")


def suspend(process: subprocess.Popen[Any] | psutil.Process) -> None:
    """Make a process hang. Its threads may go on for some milliseconds after the signal, so wait until they stop."""
    suspended = psutil.Process(process.pid)
    suspended.suspend()
    wait_until(lambda: suspended.status() == psutil.STATUS_STOPPED)


@contextmanager
def round_trips(redis: Redis) -> Iterator[Callable[[], int]]:
    """Count the round trips to Redis: each takes a connection from the pool, a pipeline once for all its commands."""
    pool = redis.connection_pool
    with patch.object(pool, "get_connection", wraps=pool.get_connection) as get_connection:
        yield lambda: get_connection.call_count


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def free_port(host: str = "0.0.0.0") -> int:
    """Find a port that is free at an address; by default at all of this machine's, as the service listens there.

    Processes that test at the same time take turns, by a file that has a byte for each port so far. So none gets what
    another one has found and does not use yet, or what its clients still ask after its server has ended.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with Path(tempfile.gettempdir(), f"kuaishang-ports-{os.getuid()}").open("ab", buffering=0) as turns:
        for _ in PORTS:
            turns.write(b".")  # which appends, and so moves to the end of this byte, whoever else does
            port = PORTS[turns.tell() % len(PORTS)]
            with suppress(OSError), socket.create_server((host, port), family=family):
                return port
    raise AssertionError(f"no port is free at {host}")


class Process:
    """A Python program in its own process, with its output in a file and its errors in another file beside it.

    It is killed if it does not start or stop in time, and gets a signal when this process dies.
    """

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        output: Path,
        root: Path = ROOT,
        last_signal: signal.Signals = signal.SIGKILL,
        within: Sequence[str] = (),
        python: str = sys.executable,
    ) -> None:
        words = [*bound_to_this_process(last_signal), *within, python, "-m", *command]
        with output.open("ab") as stdout, output.with_suffix(".errors").open("ab") as stderr:
            self.popen = subprocess.Popen(words, cwd=root, env=env, stdout=stdout, stderr=stderr)

    def wait_for(self, url: str) -> None:
        """Wait until it answers at this URL."""
        try:
            wait_until(lambda: answers(url) or self.popen.poll() is not None)
            assert self.popen.poll() is None, "ended instead of starting"
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        try:
            self.popen.terminate()
            self.popen.wait(WAIT_SECONDS)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End it and its children, as a crash of the machine would."""
        if self.popen.poll() is not None:
            return
        family: list[psutil.Process] = []
        found = [psutil.Process(self.popen.pid)]
        while found:  # those that are suspended start no others
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            family += found
            found = [child for child in family[0].children(recursive=True) if child not in family]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.popen.wait()
        psutil.wait_procs(family)


class Program:
    """A program of any language in its own process, which can be killed and started again, with its output in a file.

    :param file: takes the output.
    :param starts: whether it runs when the constructor returns.
    """

    def __init__(
        self, file: Path, command: Sequence[str], env: Mapping[str, str] | None = None, starts: bool = True
    ) -> None:
        self.file, self._command = file, [*bound_to_this_process(), *command]
        self._env = {"PATH": os.environ["PATH"], **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        if starts:
            self.start()

    def start(self) -> None:
        with self.file.open("ab") as output:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=output, stderr=output)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(WAIT_SECONDS)
            self.process = None

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def suspend(self) -> None:
        assert self.process
        suspend(self.process)

    def resume(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        return self.file.read_text()


class Simulator:
    """The WeChat simulator and its controls."""

    def __init__(self, output: Path, host: str = "127.0.0.1") -> None:
        port = free_port()
        self.url = f"http://{host}:{port}"
        command = ["dev.wechat_simulator", "--host", host, "--port", str(port)]
        command += ["--app-id", APP_ID, "--app-secret", APP_SECRET]
        command += ["--web-app", f"{WEB_APP_ID}:{WEB_APP_SECRET}"]
        command += ["--push-token", PUSH_TOKEN, "--push-aes-key", PUSH_AES_KEY]
        self.process = Process(command, dict(os.environ), output)
        self.process.wait_for(f"{self.url}/simulator/calls")

    def code(self, **wanted: Any) -> str:
        return self._post("codes", **wanted)["code"]

    def phone_code(self, **wanted: Any) -> str:
        return self._post("phone_codes", **wanted)["code"]

    def user_data(self, openid: str, data: dict[str, Any], **wanted: Any) -> dict[str, str]:
        return self._post("user_data", openid=openid, data=data, **wanted)

    def accept(self, openid: str, template_id: str, times: int = 1) -> None:
        self._post("subscriptions", openid=openid, template_id=template_id, times=times)

    def subscribe_messages(self) -> list[dict[str, Any]]:
        return self._get("subscribe_messages")["messages"]

    def customer_messages(self) -> list[dict[str, Any]]:
        return self._get("customer_messages")["messages"]

    def web_user(self, **wanted: Any) -> dict[str, str | None]:
        """Set who uses the browser; returns the openid and unionid."""
        return self._post("web_user", **wanted)

    def sign_in_on_the_web(self, authorize_url: str, agree: bool = True) -> str:
        """Open WeChat's page and return the URL that the choice leads to, without following it."""
        page = requests.get(authorize_url, allow_redirects=False, timeout=WAIT_SECONDS)
        if page.status_code == 302:
            return page.headers["Location"]
        link = re.search(rf'<a id="{"agree" if agree else "decline"}" href="([^"]*)"', page.text)
        assert link, page.text
        return html.unescape(link[1])

    def session_key(self, openid: str) -> str:
        return self._get(f"session_keys/{openid}")["session_key"]

    def access_token(self) -> str | None:
        return self._get("access_token")["access_token"]

    def access_tokens(self) -> tuple[int, list[list[float]]]:
        """Return how often one was asked for by force, and when each was used first and last, in the order of issue."""
        answer = self._get("access_tokens")
        return answer["forced"], answer["uses"]

    def drop_access_token(self) -> None:
        requests.delete(f"{self.url}/simulator/access_token", timeout=WAIT_SECONDS).raise_for_status()

    def push(self, message: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
        """Push a message to the service; returns its response to each attempt."""
        return self._post("push", message=message, **wanted)["answers"]

    def verify_push(self, **wanted: Any) -> dict[str, Any]:
        return self._post("push/verify", **wanted)

    def reset_secret(self, secret: str) -> None:
        self._post("secret", secret=secret)

    def travel(self, seconds: float) -> None:
        self._post("clock", advance=seconds)

    def fault(self, kind: str, times: int = 1, path: str = "/sns/jscode2session", **details: Any) -> None:
        self._post("faults", path=path, kind=kind, times=times, **details)

    def secrets(self) -> set[str]:
        return set(self._get("secrets")["secrets"])

    def calls(self, path: str | None = None) -> list[dict[str, Any]]:
        return [call for call in self._get("calls")["calls"] if path in (None, call["path"])]

    def forget(self) -> None:
        requests.delete(f"{self.url}/simulator", timeout=WAIT_SECONDS).raise_for_status()

    def _get(self, control: str) -> dict[str, Any]:
        answer = requests.get(f"{self.url}/simulator/{control}", timeout=WAIT_SECONDS)
        answer.raise_for_status()
        return answer.json()

    def _post(self, control: str, **wanted: Any) -> dict[str, Any]:
        # A push waits three times, up to 5 s each.
        answer = requests.post(f"{self.url}/simulator/{control}", json=wanted, timeout=WAIT_SECONDS)
        answer.raise_for_status()
        return answer.json()


class Service:
    """The service as in production: gunicorn, its configuration file, settings from the environment and its ENV_FILE.

    :param module: where gunicorn finds the application.
    :param within: words before its command.
    """

    def __init__(self, environ: dict[str, str], output: Path, module: str = "wsgi", within: Sequence[str] = ()) -> None:
        self.module = module
        self.within = within
        self.environ = {
            "ENV_FILE": os.devnull,
            **environ,
            "PATH": os.environ["PATH"],
            "PORT": str(free_port()),
        }
        self.url = f"http://127.0.0.1:{self.environ['PORT']}"
        self.output = output
        self.tokens: list[str] = []
        self._log_start = 0
        self.start()

    def start(self) -> None:
        command = ["gunicorn", f"{self.module}:app"]
        self.process = Process(command, self.environ, self.output, within=self.within)
        self.process.wait_for(f"{self.url}/livez")

    def stop(self) -> None:
        self.process.stop()

    def kill(self) -> None:
        self.process.kill()

    def discard(self) -> None:
        """Kill it, and remove the directory of its metrics, which the next start on its port would."""
        self.kill()
        for left in Path("/dev/shm").glob(f"kuaishang-*:{self.environ['PORT']}-*"):
            shutil.rmtree(left)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.popen.pid).children()

    def clear_log(self) -> None:
        """Let `log` and `log_lines` begin with what is written from now on."""
        self._log_start = self.output.stat().st_size

    def log(self) -> str:
        return self._log() + self.output.with_suffix(".errors").read_text()

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log().rpartition("\n")[0].splitlines()]

    def _log(self) -> str:
        return self.output.read_bytes()[self._log_start :].decode(errors="replace")  # half a character at the end

    def try_to_log_in(self, simulator: Simulator, **wanted: Any) -> requests.Response:
        body = {"code": simulator.code(**wanted)}
        return requests.post(f"{self.url}/api/v1/auth/wechat", json=body, timeout=WAIT_SECONDS)

    def log_in(self, simulator: Simulator, **wanted: Any) -> str:
        return self._token_of(self.try_to_log_in(simulator, **wanted))

    def log_in_when_available(self, simulator: Simulator, **wanted: Any) -> str:
        """Log in, in as many tries as a busy machine takes; each has a code of its own."""
        return self._token_of(until_available(lambda: self.try_to_log_in(simulator, **wanted)))

    def _token_of(self, login: requests.Response) -> str:
        assert login.status_code == 200, login.text
        self.tokens.append(login.json()["data"]["token"])
        return self.tokens[-1]

    def call(self, method: str, path: str, token: str, **options: Any) -> requests.Response:
        return requests.request(
            method, f"{self.url}/api/v1{path}", headers=bearer(token), timeout=WAIT_SECONDS, **options
        )

    def read_me(self, token: str) -> requests.Response:
        return self.call("GET", "/users/me", token)


def migrate(database_url: str, direction: str = "upgrade", revision: str = "head") -> None:
    """Do as `alembic upgrade head` does, without the second that a process of its own takes."""
    config = Config(toml_file=ROOT / "pyproject.toml")
    with patch.dict(os.environ, DATABASE_URL=database_url, ENV_FILE=os.devnull):
        getattr(command, direction)(config, revision)


def counted(metric: str, **labels: str) -> float:
    """Return the value of a metric of the application in this process."""
    return metrics.REGISTRY.get_sample_value(f"kuaishang_{metric}", labels) or 0


def let_claims_be_due(redis: Redis) -> None:
    """Let the time be over that those have who took messages and have not handled them."""
    stream, idle = message_queue.STREAM, message_queue.CLAIM_MILLISECONDS
    for taken in redis.xpending_range(stream, "workers", "-", "+", 100):
        redis.xclaim(stream, "workers", taken["consumer"], 0, [taken["message_id"]], idle=idle, justid=True)


def until_available(request: Callable[[], requests.Response]) -> requests.Response:
    """Send a request again for as long as a busy machine answers 503, as its clients do."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (answer := request()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def again_if_late(request: Callable[[], requests.Response], status: int) -> requests.Response:
    """Send a request again, at most twice, if a busy machine answers 503 in place of this status.

    A 504 has 50 ms (`wechat.transport.RESPOND_SECONDS`) before the request's deadline, which is a 503.
    """
    for _ in range(2):
        answer = request()
        if status == 503 or answer.status_code != 503:
            return answer
    return request()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def having(name: str, text: str) -> ColumnElement[bool]:
    """Return the condition that users have exactly this text in an encrypted field."""
    return getattr(User, name).equals(text)  # type: ignore[no-any-return]
