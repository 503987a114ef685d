import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from telemetry import instance_directory
from telemetry.exposition import Instance
from tests.harness import ROOT

MAKE = """
import os, sys
from telemetry import instance_directory
instance_directory.make(os.getuid(), os.getgid())
print(os.environ["PROMETHEUS_MULTIPROC_DIR"], flush=True)
sys.stdin.read()
"""


class Master:
    """A process with a directory of its own, until it is killed."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", MAKE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.popen.stdout
        self.directory = Path(self.popen.stdout.readline().strip())
        assert self.directory.name.startswith(instance_directory.PREFIX)  # it is removed in the end, whatever it is

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(instance_directory.VARIABLE, str(tmp_path))
    return tmp_path


def count(directory: Path, pid: int, **values: float) -> None:
    """Count as a worker of this process id does."""
    file = MmapedDict(str(directory / f"counter_{pid}.db"))
    for name, value in values.items():
        file.write_value(mmap_key(name, f"{name}_total", [], [], "Help."), value, 0)
    file.close()


def samples(metrics: object) -> dict[str, float]:
    assert all(isinstance(metric, Metric) for metric in metrics)
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}


@pytest.fixture
def start_master() -> Iterator[Callable[[], Master]]:
    masters: list[Master] = []

    def start() -> Master:
        masters.append(Master())
        return masters[-1]

    yield start
    for master in masters:
        master.kill()
        shutil.rmtree(master.directory, ignore_errors=True)


def test_each_has_a_directory_that_nobody_else_may_enter_and_those_of_the_killed_are_removed(
    start_master: Callable[[], Master],
) -> None:
    one, other = start_master(), start_master()
    assert one.directory != other.directory
    assert one.directory.stat().st_mode & 0o777 == 0o700
    for master in (one, other):
        (master.directory / "counter_1.db").touch()
    one.kill()
    assert list(start_master().directory.iterdir()) == []
    assert not one.directory.exists()
    assert (other.directory / "counter_1.db").exists()
    other.kill()
    start_master()
    assert not other.directory.exists()


def test_what_the_dead_have_counted_is_kept_in_one_file_and_their_gauges_are_not(directory: Path) -> None:
    count(directory, 7, requests=3)
    count(directory, 77, requests=20, logins=1)
    (directory / "gauge_livesum_7.db").touch()
    (directory / "gauge_mostrecent_7.db").touch()
    (directory / "histogram_7.db").touch()  # begun, and killed before anything was in it
    instance_directory.fold(7)
    assert {path.name for path in directory.glob("*.db")} == {"counter_retired.db", "counter_77.db"}
    count(directory, 7, requests=500)  # the system uses a number again
    assert samples(Instance().collect()) == {"requests_total": 523, "logins_total": 1}
    instance_directory.fold(7)
    instance_directory.fold(77)
    assert {path.name for path in directory.glob("*.db")} == {"counter_retired.db"}
    assert samples(Instance().collect()) == {"requests_total": 523, "logins_total": 1}


def test_a_file_that_cannot_be_read_is_removed_for_the_others_sake(directory: Path) -> None:
    (directory / "counter_7.db").write_bytes(struct.pack("iiii", 100, 0, 1000, 0) + bytes(84))
    with pytest.raises(RuntimeError, match="corrupted"):
        instance_directory.fold(7)
    count(directory, 8, requests=1)
    assert samples(Instance().collect()) == {"requests_total": 1}


def test_nothing_is_missing_or_counted_twice_while_the_dead_are_folded(directory: Path) -> None:
    dead = range(1, 61)
    for pid in dead:
        count(directory, pid, **{f"metric_{number}": 1 for number in range(20)})

    def fold() -> None:
        for pid in dead:
            instance_directory.fold(pid)
            time.sleep(0.02)

    folding = threading.Thread(target=fold)
    folding.start()
    read = 0
    while folding.is_alive():
        assert set(samples(Instance().collect()).values()) == {60}
        read += 1
    folding.join()
    assert read > 10
    assert set(samples(Instance().collect()).values()) == {60}


def test_a_fold_without_end_is_not_waited_for_for_ever(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telemetry.exposition.PATIENCE_SECONDS", 0.1)
    (directory / "folds").write_bytes(b".")
    with pytest.raises(TimeoutError):
        Instance().collect()


def test_a_worker_that_has_just_begun_a_file_does_no_harm(directory: Path) -> None:
    count(directory, 7, requests=3)
    (directory / "counter_8.db").touch()
    assert samples(Instance().collect()) == {"requests_total": 3}


def test_a_directory_that_somebody_removed_is_made_again(directory: Path) -> None:
    directory.rmdir()
    instance_directory.ensure(os.getuid(), os.getgid())
    assert directory.stat().st_mode & 0o777 == 0o700
    assert instance_directory._lock(str(directory)) is None  # held, so that nobody takes it for left
    (directory / "kept").touch()
    instance_directory.ensure(os.getuid(), os.getgid())
    assert (directory / "kept").exists()
