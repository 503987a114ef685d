"""What a test starts has ports of its own, and is stopped, whatever happens."""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests import harness
from tests.harness import PORTS, ROOT, Service, free_port, wait_until

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
FIND_PORTS = "from tests.harness import free_port; print(*(free_port() for _ in range(200)))"


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


def test_processes_that_look_for_ports_at_once_find_different_ones_that_no_connection_gets() -> None:
    command = [sys.executable, "-c", FIND_PORTS]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: subprocess.check_output(command, cwd=ROOT, text=True).split(), range(4)))
    ports = [int(port) for part in found for port in part]
    assert len(set(ports)) == len(ports) == 800
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as made:
        given = min(server.getsockname()[1], made.getsockname()[1])
    of_clusters = {port + 10_000 for port in PORTS}
    assert set(ports) <= set(PORTS)
    assert max(PORTS) < min(of_clusters) <= max(of_clusters) < given


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
def test_a_port_that_is_taken_at_an_address_is_not_free_at_all_addresses() -> None:
    taken = free_port()
    with socket.create_server(("127.0.0.1", taken)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "PORTS", [taken])
        assert free_port("127.0.0.2") == taken
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(AssertionError, match="no port is free"):
                free_port(host)
