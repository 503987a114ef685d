"""A server as `deploy/patch` runs it: a home with releases, the supervisor, and how to change a release."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

from deploy.patch.supervisor import Figures
from tests.faults.stage import Stage
from tests.harness import METRICS_TOKEN, ROOT, WAIT_SECONDS, Process, bearer, free_port, wait_until

NEXT_METRICS_TOKEN = "the-next-metrics-token"
FOLDERS = ("blueprints", "deploy", "dev", "storage", "telemetry", "wechat")
FILES = ("pyproject.toml", "requirements.txt", "requirements-dev.txt", "openapi.json", "openapi.en.json")


def copy_tree(target: Path) -> Path:
    """Copy what a release consists of."""
    target.mkdir(parents=True)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in FILES)):
        shutil.copy(path, target)
    return target


class Server:
    """A home folder and its supervisor, started.

    :param environ: the settings; HOME/.env has those of `in_file`. Without a PORT, it gets a free one.
    :param released: whether it has a release, and serves.
    """

    def __init__(self, home: Path, environ: dict[str, str], released: bool = True, **in_file: str) -> None:
        self.home = home
        host = environ.get("HOST", "127.0.0.1")
        self.port = int(environ.get("PORT") or free_port(host))
        self.url = f"http://{host}:{self.port}"
        self.environ = {**environ, "PATH": os.environ["PATH"], "PORT": str(self.port), "HOST": host}
        (home / "environments").mkdir(parents=True)
        (home / "releases").mkdir()
        self.write_settings(**in_file)
        pins = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()[:12]
        environment = home / "environments" / f"{pins}-{sys.version_info.major}.{sys.version_info.minor}"
        environment.mkdir()  # as patch.py makes it, without the minute that this takes
        for path in Path(sys.prefix).iterdir():
            (environment / path.name).symlink_to(path)
        (environment / "complete").touch()
        self._environment = environment.name
        self._releases = 0
        self.state = home / "state.json"
        if released:
            self.state.write_text(json.dumps({"current": self.release(), "provisional": "", "previous": []}))
            self.start()

    def write_settings(self, **in_file: str) -> None:
        path = self.home / ".env"
        path.touch(0o600)
        path.write_text("".join(f"{name}={value}\n" for name, value in in_file.items()))

    def start(self) -> None:
        self.process = Process(["deploy.patch.supervisor", str(self.home)], self.environ, self.home / "output")
        self.process.wait_for(f"{self.url}/livez")
        wait_until(lambda: len(self.workers()) == 2)

    def release(self, change: Callable[[Path], Any] = lambda tree: None) -> str:
        """Put a release into its place, so changed, as `patch.py` does when all its checks have passed."""
        self._releases += 1
        name = f"release-{self._releases}"
        tree = copy_tree(self.home / "releases" / name)
        (tree / "environment").symlink_to(f"../../environments/{self._environment}")
        facts = {"version": "0.1.0", "commit": name, "built": "2026-01-01T00:00:00Z"}
        (tree / "release.json").write_text(json.dumps(facts))
        change(tree)
        return name

    def ask(self, what: str, **words: Any) -> dict[str, Any]:
        """Ask the supervisor, and return the last that it says: how it ended, unless it dies."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(WAIT_SECONDS)
            control.connect(str(self.home / "control.sock"))
            control.sendall(f"{json.dumps({'do': what, 'by': 'the test', **words})}\n".encode())
            return [{}, *map(json.loads, control.makefile())][-1]

    def patch(self, release: str, watch: float = 0) -> dict[str, Any]:
        return self.ask("patch", release=release, watch=watch)

    def tool(
        self, *words: str, script: Path = ROOT / "deploy/patch/patch.py", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run patch.py as an operator does."""
        command = [sys.executable, str(script), *words, "--home", str(self.home)]
        env = {**self.environ, **environ}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=2 * WAIT_SECONDS)

    def serves(self) -> str:
        """Return the release that responds, once the workers that were retired have ended."""
        return wait_until(self._agreed)

    def _agreed(self) -> str | None:
        if len(self.workers()) > 2:
            return None
        versions = [requests.get(f"{self.url}/version", timeout=WAIT_SECONDS) for _ in range(10)]
        answered = {version.json()["data"]["commit"] for version in versions}
        return answered.pop() if len(answered) == 1 else None

    def current(self) -> str:
        """Return the release that the link says serves."""
        return (self.home / "current").resolve().name

    def metrics(self) -> str:
        headers = bearer(METRICS_TOKEN)
        return requests.get(f"{self.url}/metrics", headers=headers, timeout=WAIT_SECONDS).text

    def counted(self) -> Figures:
        return Figures.of(self.metrics())

    def said(self, message: str) -> int:
        """Return how often the supervisor has said it."""
        return sum(line["message"] == message for line in self.lines())

    def masters(self) -> list[psutil.Process]:
        return psutil.Process(self.process.popen.pid).children()

    def workers(self) -> list[psutil.Process]:
        """Return all that accept requests, or still finish some."""
        found = []
        for master in self.masters():
            with suppress(psutil.NoSuchProcess):  # a retired one has just ended
                found += master.children()
        return found

    def lines(self) -> list[dict[str, Any]]:
        whole = (self.home / "output").read_text(errors="replace").rpartition("\n")[0]  # the last one may not be
        return [json.loads(line) for line in whole.splitlines()]

    def discard(self) -> None:
        """End all at once, as a crash of the machine does."""
        self.process.kill()
        for left in Path("/dev/shm").glob(f"kuaishang-*:{self.port}-*"):
            shutil.rmtree(left, ignore_errors=True)


class Patched(Stage):
    """The stage of the faults, with a supervisor in the place of the service."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack, mariadb=False)
        self.secrets = {name: self.environ.pop(name) for name in ("SECRET_KEY", "ENCRYPTION_KEYS", "WECHAT_APP_SECRET")}
        self.secrets["METRICS_TOKEN"] = f"{self.environ.pop('METRICS_TOKEN')}, {NEXT_METRICS_TOKEN}"
        environ = {**self.patient(), "START_SECONDS": "20"}
        self.server = Server(self.folder / "home", environ, **self.secrets)
        self.service = self.server  # type: ignore[assignment]


def replace_workers(server: Server) -> None:
    wait_until(lambda: len(server.workers()) == 2)
    for worker in server.workers():
        worker.kill()
        psutil.wait_procs([worker])
        wait_until(lambda: len(server.workers()) == 2)
