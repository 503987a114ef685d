"""A full /dev/shm, under gunicorn as in production: the service goes on without metrics, and takes them up again."""

import secrets
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness import Service, Simulator, answers, wait_until
from tests.test_probes import VERSIONS, WORKER_DEATHS, WORKER_STARTS, directory_of, scrape, version

StartService = Callable[..., Service]
OWN_MOUNTS = ["unshare", "--mount", "sh", "-c"]
SIZE = 1 << 20


def with_shm(first: str = "true", to: str = "") -> list[str]:
    """Words before a command that gives it a small /dev/shm of its own, prepared by a command of the shell.

    :param to: a redirection of its output.
    """
    return [*OWN_MOUNTS, f'mount -t tmpfs -o size={SIZE} tmpfs /dev/shm && {first} && exec "$@"{to}', "sh"]


@pytest.fixture(autouse=True)
def _mounts() -> None:
    if subprocess.run([*with_shm(), "true"], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")


def shm_of(service: Service) -> Path:
    return Path(f"/proc/{service.process.popen.pid}/root/dev/shm")


def fill(folder: Path) -> None:
    """Leave not a byte."""
    with suppress(OSError), (folder / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def ask_for_much(service: Service, token: str) -> None:
    """Ask for what makes many new series."""
    for path in ("/users/me", "/orders", "/orders/1", "/users/0", "/auth/wechat", "/users/me/export"):
        for method in ("GET", "HEAD", "OPTIONS", "PUT"):
            assert service.call(method, path, token).status_code < 500


def warnings(service: Service) -> list[str]:
    lines = service.log_lines()
    return [line["message"] for line in lines if line["logger"] == "telemetry.multiprocess"]


def test_a_start_without_room_serves_without_metrics_until_there_is_some(
    start_service: StartService, simulator: Simulator
) -> None:
    service = start_service(within=with_shm("! head -c 2M /dev/zero >/dev/shm/full 2>&-"), WEB_CONCURRENCY="2")
    workers = service.workers()
    token = service.log_in(simulator)
    ask_for_much(service, token)
    for _ in range(20):
        assert version(service) == 200
    assert not scrape(service)
    assert service.workers() == workers
    wait_until(lambda: len(warnings(service)) == len(workers))
    assert all("No space left on device" in message for message in warnings(service))
    (shm_of(service) / "full").unlink()
    # Each worker takes up its own numbers when it is asked for them.
    wait_until(lambda: scrape(service).get(VERSIONS) == 20)
    assert scrape(service)[WORKER_DEATHS] == 0
    assert len(warnings(service)) == len(workers)


@pytest.mark.parametrize("options", ["nr_inodes=1", "ro"])
def test_where_nothing_can_be_made_at_all_the_disk_takes_its_place(start_service: StartService, options: str) -> None:
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    service = start_service(within=[*OWN_MOUNTS, mount, "sh"], WEB_CONCURRENCY="1")
    assert version(service) == 200
    assert scrape(service)[VERSIONS] == 1
    service.stop()
    assert service.process.popen.returncode == 0


def test_memory_that_fills_up_stops_no_worker_and_counts_go_on_where_they_were(
    start_service: StartService, simulator: Simulator
) -> None:
    service = start_service(within=with_shm(), WEB_CONCURRENCY="1")
    token = service.log_in(simulator)
    assert version(service) == 200
    fill(shm_of(service))
    (worker,) = service.workers()
    ask_for_much(service, token)
    assert version(service) == 200
    assert scrape(service)[VERSIONS] == 2  # it has its place
    assert service.workers() == [worker]
    worker.kill()
    wait_until(lambda: answers(f"{service.url}/livez"))
    ask_for_much(service, token)
    assert version(service) == 200
    assert scrape(service)[VERSIONS] >= 2  # those of the dead one
    (shm_of(service) / "full").unlink()
    after = scrape(service)
    assert (after[VERSIONS], after[WORKER_STARTS], after[WORKER_DEATHS]) == (3, 2, 1)
    service.stop()
    assert service.process.popen.returncode == 0
    assert "SIGBUS" not in service.log()


def test_a_damaged_file_costs_its_own_numbers(start_service: StartService) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    assert version(service) == 200
    folder = directory_of(service)
    (intact,) = folder.glob("counter_*.db")
    contents = intact.read_bytes()
    used = int.from_bytes(contents[:4], sys.byteorder)
    for name, damaged in {
        "counter_1.db": contents[:100],  # cut off
        "counter_2.db": contents[:3],
        "counter_3.db": contents[:8] + secrets.token_bytes(4096),
        "counter_4.db": contents[:12] + b"\xff" * 40 + contents[52:],  # a key that is not UTF-8
        "counter_5.db": (used * 1000).to_bytes(4, sys.byteorder) + contents[4:],
        "counter_6.db": contents[:8] + (-28).to_bytes(4, sys.byteorder, signed=True) + contents[12:],
        "counter_7.db": contents[:12] + b"{" + contents[13:],
        "counter_8.db": b"",
        "gauge_9.db": contents,
        "other_10.db": contents,
        "nothing.db": contents,
    }.items():
        (folder / name).write_bytes(damaged)
        assert scrape(service)[VERSIONS] == 1, name
    wait_until(lambda: len(warnings(service)) == 10)


def test_a_full_disk_for_the_log_costs_lines_alone(start_service: StartService, simulator: Simulator) -> None:
    fill_up = "mkdir /dev/shm/log && mount -t tmpfs -o size=4k tmpfs /dev/shm/log"
    service = start_service(within=with_shm(fill_up, to=" >/dev/shm/log/lines 2>&1"), WEB_CONCURRENCY="1")
    token = service.log_in(simulator)
    ask_for_much(service, token)
    wait_until(lambda: scrape(service)["kuaishang_log_lines_dropped_total",])
    (shm_of(service) / "log" / "lines").write_bytes(b"")  # as a rotation does
    ask_for_much(service, token)
    lines = shm_of(service) / "log" / "lines"
    wait_until(lambda: b'"request"' in lines.read_bytes())
