"""SIGHUP to gunicorn's own master: a tree that cannot serve never replaces one that does."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.deploy.patch.broken import BROKEN, add
from tests.deploy.patch.server import copy_tree
from tests.faults.load import codes, is_right, load
from tests.faults.stage import Stage
from tests.harness import METRICS_TOKEN, WAIT_SECONDS, Process, Service, bearer, free_port, wait_until

AT = {
    "a syntax error": "def (",
    "an import error": "import nothing_like_it",
    "a dependency that is not installed": "import no_such_package",
    "a crash at the start": "raise RuntimeError",
    "a crash on each request": "1 / 0",
    "too much memory at the start": "hog = ",
    "a broken gunicorn.conf.py": "workers = 1 / 0",
    "a gunicorn.conf.py that is no Python": "def (",
    "a broken settings.py": "raise ValueError",
    "a worker that does not start": "raise RuntimeError",
}
"""By what is broken: the line that the log leads to, if there is one."""


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
        wait_until(self.has_begun)  # before a test breaks the tree

    def has_begun(self) -> bool:
        workers = {str(worker.pid) for worker in self.workers()}
        # Until a worker is loaded its numbers are 0.
        return len(workers) == 2 and workers <= {*re.findall(r'_start_time_seconds{pid="(\d+)"} [1-9]', self.metrics())}

    def reload(self) -> None:
        self.process.popen.send_signal(signal.SIGHUP)

    def metrics(self) -> str:
        return requests.get(f"{self.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text

    def flag(self) -> Path:
        """Return the file that says that a reload was refused."""
        [directory] = Path("/dev/shm").glob(f"kuaishang-*:{self.environ['PORT']}-*")
        return directory / "reload-refused"


class Reloaded(Stage):
    """The stage of the faults, with a service that is reloaded in place."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack, mariadb=False)
        environ = {**self.patient(), "START_SECONDS": "20", "MEMORY_MB": "512"}
        self.in_place = self.service = InPlace(environ, self.folder)


def complaints(service: InPlace) -> list[dict[str, Any]]:
    """Return the lines that say that something is wrong with the tree."""
    lines = [line for line in service.log_lines() if line["level"] in ("WARNING", "ERROR", "CRITICAL")]
    return [line for line in lines if "cannot serve" not in line["message"]]  # a busy machine leaves a check no time


@pytest.fixture(scope="module")
def stage() -> Iterator[Reloaded]:
    with ExitStack() as stack:
        yield Reloaded(stack)


@pytest.fixture
def service(stage: Reloaded) -> InPlace:
    """The service with both workers, loaded."""
    wait_until(stage.in_place.has_begun)
    stage.in_place.clear_log()
    return stage.in_place


@pytest.mark.parametrize("name", BROKEN)
def test_a_reload_of_a_broken_tree_is_one_line_and_no_request_fails(
    stage: Reloaded, service: InPlace, tmp_path: Path, name: str
) -> None:
    workers = {worker.pid for worker in service.workers()}
    whole = shutil.copytree(service.first, tmp_path / "whole")
    service.flag().unlink(missing_ok=True)
    try:
        BROKEN[name][0](service.first)
        with load(stage) as running:
            service.reload()
            wait_until(lambda: "reload refused" in service.log())
            wait_until(lambda: "kuaishang_reload_refused 1.0" in service.metrics())
            time.sleep(0.2)
        broken = {path: path.read_text().splitlines() for path in service.first.rglob("*.py")}
    finally:
        shutil.copytree(whole, service.first, dirs_exist_ok=True)

    assert service.process.popen.poll() is None
    errors = [line["message"] for line in complaints(service) if line["level"] != "WARNING"]
    assert len(errors) == 1, "\n".join(errors)
    assert BROKEN[name][1] in errors[0]
    if name in AT:
        path, number = re.findall(r'File "(.+)", line (\d+)', errors[0])[-1]
        assert AT[name] in broken[Path(path).resolve()][int(number) - 1]
    assert {worker.pid for worker in service.workers()} == workers
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    assert running.count_orders() == (0, 0)


def test_a_reload_of_a_good_tree_takes_over_and_no_request_fails(stage: Reloaded, service: InPlace) -> None:
    workers = {worker.pid for worker in service.workers()}
    service.flag().touch()
    with load(stage) as running:
        service.reload()
        wait_until(lambda: len(found := {worker.pid for worker in service.workers()}) == 2 and not found & workers)
        wait_until(lambda: "kuaishang_reload_refused 0.0" in service.metrics())
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    assert running.count_orders() == (0, 0)
    assert complaints(service) == []


def test_a_reload_while_redis_is_away_is_none_of_the_trees_fault(stage: Reloaded, service: InPlace) -> None:
    workers = {worker.pid for worker in service.workers()}
    stage.redis_proxy.refuse()
    try:
        wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS).status_code == 503)
        service.reload()
        wait_until(lambda: len(found := {worker.pid for worker in service.workers()}) == 2 and not found & workers)
    finally:
        stage.redis_proxy.listen()
    assert "reload refused" not in service.log()
    wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS).ok)


def test_a_worker_that_dies_while_the_tree_is_broken_takes_no_other_one_with_it(service: InPlace) -> None:
    worker, other = service.workers()
    orders = (service.first / "blueprints/orders.py").read_text()
    BROKEN["a syntax error"][0](service.first)
    try:
        worker.kill()
        wait_until(lambda: service.log().count("Exception in worker process") > 1)
        assert service.process.popen.poll() is None
        wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS).ok)
    finally:
        (service.first / "blueprints/orders.py").write_text(orders)
    wait_until(service.has_begun)
    assert other in service.workers()


def test_a_stop_does_not_wait_for_a_trial(stage: Reloaded, tmp_path: Path) -> None:
    environ = {**stage.in_place.environ, "PORT": str(free_port()), "START_SECONDS": "600"}
    service = InPlace(environ, tmp_path)
    try:
        add("wsgi.py", "import time; time.sleep(600)")(service.first)
        master = psutil.Process(service.process.popen.pid)
        others = {child.pid for child in master.children()}
        service.reload()
        trial = wait_until(
            lambda: [child for child in master.children() if child.pid not in others and child.children()]
        )
        service.process.popen.terminate()
        assert service.process.popen.wait(WAIT_SECONDS) == 0
        assert psutil.wait_procs(trial, WAIT_SECONDS)[1] == []
    finally:
        service.discard()


def test_a_reload_of_nothing_is_refused_even_where_the_metrics_have_no_room(service: InPlace) -> None:
    workers = {worker.pid for worker in service.workers()}
    shutil.rmtree(service.flag().parent)
    service.current.unlink()
    try:
        service.reload()
        wait_until(lambda: "reload refused: [Errno 2] No such file or directory" in service.log())
    finally:
        service.current.symlink_to(service.first)
    assert requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).ok
    service.reload()
    wait_until(lambda: len(found := {worker.pid for worker in service.workers()}) == 2 and not found & workers)


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
