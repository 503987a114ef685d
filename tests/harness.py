"""The programs that the tests run against, each a process of its own, and the ways to steer them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from dev.run import free_port

ROOT = Path(__file__).resolve().parent.parent
APP_ID, APP_SECRET = "wx0123456789abcdef", "an-app-secret-nobody-may-see"


def wait_until(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """Poll until the condition holds, and answer what it answered."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        outcome = condition()
        if outcome:
            return outcome
        time.sleep(0.05)
    raise AssertionError(f"not so within {seconds} s")


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


class Process:
    """A program of ours in its own process, its output in a file, and its errors in another beside it."""

    def __init__(self, command: list[str], env: dict[str, str], output: Path) -> None:
        with output.open("ab") as stdout, output.with_suffix(".errors").open("ab") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=stdout, stderr=stderr
            )

    def stop(self) -> None:
        self.popen.terminate()
        self.popen.wait(30)


class Simulator:
    """The WeChat simulator, and the ways to steer it."""

    def __init__(self, output: Path) -> None:
        port = free_port("the simulator's port", "0")
        self.url = f"http://127.0.0.1:{port}"
        command = ["dev.wechat_simulator", "--port", str(port), "--app-id", APP_ID, "--app-secret", APP_SECRET]
        self.process = Process(command, dict(os.environ), output)
        wait_until(lambda: answers(f"{self.url}/simulator/calls"))

    def code(self, **wanted: Any) -> str:
        return requests.post(f"{self.url}/simulator/codes", json=wanted, timeout=5).json()["code"]

    def fault(self, kind: str, times: int = 1, **details: Any) -> None:
        fault = {"path": "/sns/jscode2session", "kind": kind, "times": times, **details}
        requests.post(f"{self.url}/simulator/faults", json=fault, timeout=5).raise_for_status()

    def calls(self) -> list[dict[str, Any]]:
        return requests.get(f"{self.url}/simulator/calls", timeout=5).json()["calls"]

    def session_key(self, openid: str) -> str:
        return requests.get(f"{self.url}/simulator/session_keys/{openid}", timeout=5).json()["session_key"]

    def forget(self) -> None:
        requests.delete(f"{self.url}/simulator", timeout=5).raise_for_status()


class Service:
    """The service as in production: gunicorn, its configuration file, settings from the environment alone."""

    def __init__(self, environ: dict[str, str], output: Path) -> None:
        self.environ = {**environ, "PATH": os.environ["PATH"], "PORT": str(free_port("PORT", "0"))}
        self.url = f"http://127.0.0.1:{self.environ['PORT']}"
        self.output = output
        self.start()

    def start(self) -> None:
        self.process = Process(["gunicorn", "wsgi:app"], self.environ, self.output)
        wait_until(lambda: answers(f"{self.url}/livez"))

    def stop(self) -> None:
        self.process.stop()

    def log(self) -> str:
        return self.output.read_text() + self.output.with_suffix(".errors").read_text()

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def log_in(self, simulator: Simulator, **wanted: Any) -> str:
        answer = requests.post(f"{self.url}/api/v1/auth/wechat", json={"code": simulator.code(**wanted)}, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]["token"]

    def read_me(self, token: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.get(f"{self.url}/api/v1/users/me", headers=headers, timeout=5)


def migrate(database_url: str, *revision: str) -> None:
    command = [sys.executable, "-m", "alembic", *(revision or ("upgrade", "head"))]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DATABASE_URL": database_url}, check=True)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
