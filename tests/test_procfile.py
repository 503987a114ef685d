"""The Procfile as platforms run it: `release` before each deployment, then `web`, and SIGTERM to all processes."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests
from redis import Redis

from tests.harness import ROOT, WAIT_SECONDS, Process, Simulator, free_port, wait_until

pytestmark = pytest.mark.only_on("sqlite")


class Platform:
    """Runs the Procfile with an empty database, by honcho, which like platforms sets PORT and signals all processes."""

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.output = folder / "web"
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        database = f"sqlite:///{folder / 'empty.db'}"
        self.environ = {**environ, "DATABASE_URL": database, "PATH": path, "PORT": str(port), "DRAIN_SECONDS": "1"}

    def release(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "honcho", "start", "release"]
        return subprocess.run(command, cwd=ROOT, env=self.environ, capture_output=True, text=True, timeout=WAIT_SECONDS)

    @contextmanager
    def web(self) -> Iterator[Process]:
        honcho = Process(["honcho", "start", "web"], self.environ, self.output)
        try:
            honcho.wait_for(f"{self.url}/livez")
            yield honcho
        finally:
            honcho.kill()


@pytest.fixture
def platform(environ: dict[str, str], redis: Redis, tmp_path: Path) -> Platform:
    return Platform(environ, tmp_path)


def test_release_migrates_web_serves_and_sigterm_finishes_what_is_in_flight(
    platform: Platform, simulator: Simulator
) -> None:
    released = platform.release()
    assert released.returncode == 0, released.stdout
    assert platform.release().returncode == 0  # as with each deployment

    with platform.web() as web:
        assert requests.get(f"{platform.url}/readyz", timeout=WAIT_SECONDS).status_code == 200
        family = psutil.Process(web.popen.pid).children(recursive=True)
        login = f"{platform.url}/api/v1/auth/wechat"
        simulator.fault("slow", seconds=1)
        with ThreadPoolExecutor(1) as pool:
            in_flight = pool.submit(requests.post, login, json={"code": simulator.code()}, timeout=WAIT_SECONDS)
            wait_until(simulator.calls)
            web.stop()
            answer = in_flight.result()
        assert answer.status_code == 200, answer.text
        _, left = psutil.wait_procs(family, WAIT_SECONDS)
        assert left == []
    assert not list(Path("/dev/shm").glob(f"kuaishang-*:{platform.environ['PORT']}-*"))  # as a crash would leave it


def test_a_release_that_cannot_migrate_fails(platform: Platform) -> None:
    platform.environ["DATABASE_URL"] = "sqlite:////nowhere/empty.db"
    assert platform.release().returncode != 0
