import os
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from telemetry import multiprocess


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(multiprocess.MULTIPROC_DIR, str(tmp_path))
    return tmp_path


def count(directory: Path, kind: str, pid: int, value: float) -> None:
    """Count as a worker of this process id does."""
    file = MmapedDict(str(directory / f"{kind}_{pid}.db"))
    file.write_value(mmap_key("requests", "requests_total", [], [], "Help."), value, 0)
    file.close()


def samples(metrics: object) -> dict[str, float]:
    assert all(isinstance(metric, Metric) for metric in metrics)
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}


def test_the_metrics_of_all_workers_are_added_up_and_a_file_just_begun_does_no_harm(directory: Path) -> None:
    count(directory, "counter", 7, 3)
    count(directory, "counter", 77, 20)
    (directory / "counter_8.db").touch()
    assert samples(multiprocess.Instance().collect()) == {"requests_total": 23}


def test_a_gauge_that_vanishes_during_a_scrape_does_no_harm(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count(directory, "counter", 7, 3)
    gone = str(directory / "gauge_livesum_8.db")
    monkeypatch.setattr(multiprocess, "glob", lambda pattern: [str(directory / "counter_7.db"), gone])
    assert samples(multiprocess.Instance().collect()) == {"requests_total": 3}
    monkeypatch.setattr(os.path, "getsize", lambda path: 1)  # it goes only after that
    assert samples(multiprocess.Instance().collect()) == {"requests_total": 3}
