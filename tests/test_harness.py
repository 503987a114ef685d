"""What a test starts is stopped, whatever happens."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import harness
from tests.harness import ROOT, Service, wait_until

STARTER = """
import json, sys, time
from pathlib import Path
from dev.redis_server import RedisServer
from tests.harness import Service, bound_to_this_process

folder = Path(sys.argv[1])
RedisServer(folder / "redis", bound_to_this_process()).start()
Service(json.loads(sys.argv[2]), folder / "output")
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs setpriv")
def test_a_killed_run_leaves_no_process(environ: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTER, str(tmp_path), json.dumps({**environ, "WEB_CONCURRENCY": "1"})]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as starter:
        assert starter.stdout
        assert starter.stdout.readline() == b"started\n"
        started = psutil.Process(starter.pid).children(recursive=True)
        starter.kill()
    assert len(started) == 3  # Redis, gunicorn and its worker
    wait_until(lambda: not any(process.is_running() for process in started))


def test_a_service_that_does_not_start_is_killed(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = psutil.Process().children(recursive=True)
    during = []

    def interrupt(url: str) -> bool:
        during.extend(psutil.Process().children(recursive=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "answers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Service(environ, tmp_path / "output")
    assert len(during) > len(before)
    assert psutil.Process().children(recursive=True) == before
