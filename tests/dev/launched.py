"""`make run` in a process of its own."""

import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import requests

from tests.harness import ROOT, WAIT_SECONDS, Process, bearer, free_port, wait_until


class Launched(Process):
    """A launcher with a folder and a port of its own."""

    def __init__(self, var: Path, output: Path, root: Path = ROOT, **env: str) -> None:
        self.var = var
        self.output = output
        self.port = env.get("PORT") or str(free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        env = {"PATH": os.environ["PATH"], "PORT": self.port, "WEB_CONCURRENCY": "1", **env}
        self._start = partial(
            super().__init__, ["dev.run", "--var", str(var)], env, root=root, last_signal=signal.SIGTERM
        )
        self._start(output)

    def crash(self) -> list[psutil.Process]:
        """Kill it, and return what it leaves behind."""
        left_behind = self.family()
        self.popen.kill()
        self.popen.wait()
        return left_behind

    def start_again(self) -> None:
        self.output = self.output.with_name("output-again")
        self._start(self.output)
        self.ready()

    def printed(self) -> str:
        return self.on_stdout() + self.on_stderr()

    def on_stdout(self) -> str:
        return self.output.read_text()

    def on_stderr(self) -> str:
        return self.output.with_suffix(".errors").read_text()

    def kept(self) -> str:
        """The log file."""
        return (self.var / "log" / f"{self.port}.jsonl").read_text(errors="replace")

    def ready(self) -> "Launched":
        wait_until(lambda: "Ctrl-C stops everything" in self.printed() or self.popen.poll() is not None)
        assert self.popen.poll() is None, self.printed()
        return self

    def simulator_url(self) -> str:
        return re.findall(r"WeChat +(http://\S+)", self.printed())[0]

    def log_in(self) -> dict[str, str]:
        """Log in as a new user, and return the headers that say so."""
        code = requests.post(f"{self.simulator_url()}/simulator/codes", timeout=WAIT_SECONDS).json()["code"]
        login = requests.post(f"{self.url}/api/v1/auth/wechat", json={"code": code}, timeout=WAIT_SECONDS)
        return bearer(login.json()["data"]["token"])

    def me(self, headers: dict[str, str]) -> dict[str, str]:
        return requests.get(f"{self.url}/api/v1/users/me", headers=headers, timeout=WAIT_SECONDS).json()["data"]

    def request_trace_id(self) -> str:
        """Send a request, and return its trace id."""
        return requests.get(f"{self.url}/version", timeout=WAIT_SECONDS).headers["X-Trace-Id"]

    def family(self, word: str = "") -> list[psutil.Process]:
        """The processes that it started and whose command holds this word."""
        found = []
        for process in psutil.Process(self.popen.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it ends just now
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def end(self) -> None:
        if self.popen.poll() is None:
            self.stop()

    def end_by(self, number: signal.Signals) -> None:
        """Send a signal; nothing is left of what it started, and nothing failed."""
        family = self.family()
        self.popen.send_signal(number)
        assert self.popen.wait(WAIT_SECONDS) == 0
        assert psutil.wait_procs(family, timeout=WAIT_SECONDS)[1] == []
        for port in re.findall(r"http://127\.0\.0\.1:(\d+)\n", self.printed()):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", int(port))) != 0
        assert re.findall("Traceback|exceptionType=", self.printed()) == []


Launch = Callable[..., Launched]


def replace(path: Path, text: str) -> None:
    """Change a file in one step, as editors do."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


def read_version(launched: Launched) -> str:
    """The response; empty if there is none."""
    try:
        return requests.get(f"{launched.url}/version", timeout=WAIT_SECONDS).text
    except requests.RequestException:
        return ""
