"""SIGHUP to gunicorn's own master: a tree that cannot serve never replaces one that does."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
from redis import Redis

from tests.deploy.patch.server import copy_tree
from tests.deploy.patch.test_supervisor import BROKEN, Change
from tests.harness import METRICS_TOKEN, WAIT_SECONDS, Process, Service, Simulator, bearer, wait_until

HANDS_OVER = ("a syntax error", "a crash at the start", "a crash on each request", "a broken gunicorn.conf.py")


class InPlace(Service):
    """gunicorn in a tree that is edited where it runs, reached by a link."""

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        self.first = copy_tree(folder / "first")
        self.current = folder / "current"
        self.current.symlink_to(self.first)
        super().__init__(environ, folder / "output")

    def start(self) -> None:
        environ = {**self.environ, "PWD": str(self.current)}
        self.process = Process(["gunicorn", "wsgi:app"], environ, self.output, root=self.current)
        self.process.wait_for(f"{self.url}/livez")

    def reload(self) -> None:
        self.process.popen.send_signal(signal.SIGHUP)

    def metrics(self) -> str:
        return requests.get(f"{self.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text


@pytest.fixture(scope="module")
def shared_service(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[InPlace]:
    with ExitStack() as stack:
        service = InPlace(environ, tmp_path_factory.mktemp("in-place"))
        stack.callback(service.discard)
        yield service


@pytest.fixture
def service(shared_service: InPlace, redis: Redis, simulator: Simulator) -> InPlace:
    shared_service.clear_log()
    return shared_service


@pytest.mark.parametrize("change", [BROKEN[name][0] for name in HANDS_OVER], ids=HANDS_OVER)
def test_a_reload_of_a_broken_tree_is_refused_in_one_line(service: InPlace, tmp_path: Path, change: Change) -> None:
    workers = {worker.pid for worker in service.workers()}
    whole = shutil.copytree(service.first, tmp_path / "whole")
    try:
        change(service.first)
        service.reload()
        wait_until(lambda: "reload refused" in service.log())
        wait_until(lambda: "kuaishang_reload_refused 1.0" in service.metrics())
        [line] = [line for line in service.log_lines() if "reload refused" in line["message"]]
    finally:
        shutil.copytree(whole, service.first, dirs_exist_ok=True)
    assert line["level"] == "ERROR"
    assert service.process.popen.poll() is None
    assert {worker.pid for worker in service.workers()} == workers

    service.reload()
    wait_until(lambda: len(found := {worker.pid for worker in service.workers()}) == 2 and not found & workers)
    wait_until(lambda: "kuaishang_reload_refused 0.0" in service.metrics())


def test_a_release_that_a_link_leads_to_serves_after_a_reload(service: InPlace, tmp_path: Path) -> None:
    other = copy_tree(tmp_path / "other")
    release = '{"version": "0.1.0", "commit": "other", "built": "2026-01-01T00:00:00Z"}'
    (other / "release.json").write_text(release)
    draft = tmp_path / "draft"
    draft.symlink_to(other)
    os.replace(draft, service.current)
    service.reload()

    def commit() -> str:
        time.sleep(0.1)
        return requests.get(f"{service.url}/version", timeout=WAIT_SECONDS).json()["data"]["commit"]

    assert wait_until(lambda: {commit() for _ in range(10)} == {"other"})
