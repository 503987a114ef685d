"""The code reload of `make run`: whatever is saved, something serves."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from dev.sources import Source, look, means_the_same
from tests.dev.launched import Launch, Launched, read_version, replace
from tests.harness import ROOT, WAIT_SECONDS, wait_until


def patch_version(clone: Path, version: str) -> None:
    """Save a change of the code that /version shows."""
    settings = clone / "settings.py"
    replace(settings, re.sub(r"^VERSION = .*$", f'VERSION = "{version}"', settings.read_text(), flags=re.MULTILINE))


def errors_of(launched: Launched) -> list[str]:
    """The messages of gunicorn and of the code reload."""
    lines = [json.loads(line) for line in launched.kept().rpartition("\n")[0].splitlines()]  # whole ones
    found = [line for line in lines if line["level"] in ("ERROR", "CRITICAL")]
    return [line["message"] for line in found if line["logger"].startswith(("gunicorn", "dev"))]


@contextmanager
def clients(launched: Launched) -> Iterator[list[int]]:
    """Send requests without end, some on connections that are kept; none may fail.

    :returns: gets the status of each.
    """
    statuses: list[int] = []
    failures: list[requests.RequestException] = []
    ended = threading.Event()

    def ask(client: requests.Session) -> None:
        while not ended.is_set():
            try:
                statuses.append(client.get(f"{launched.url}/version", timeout=WAIT_SECONDS).status_code)
            except requests.RequestException as error:
                failures.append(error)
            ended.wait(0.02)

    class Unkept(requests.Session):
        headers = {"Connection": "close"}  # noqa: RUF012

    threads = [threading.Thread(target=ask, args=[client]) for client in (requests.Session(), Unkept())]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(statuses) == {200}


FAULTS = {
    "blueprints/health.py": ("this is no python", "SyntaxError"),
    "errors.py": ("import no_such_module", "ModuleNotFoundError"),
    "settings.py": ("no_such_name", "NameError"),
    "gunicorn.conf.py": ("from storage import no_such_name", "ImportError"),
    "storage/models.py": ("__import__('os')._exit(1)", ""),
}
"""By file: a line at its end, and what it raises."""


def test_a_fault_is_reported_and_the_old_code_serves_until_the_next_good_save(
    launch: Launch, clone: Path, environ: dict[str, str]
) -> None:
    launcher = clone / "dev" / "reload.py"  # on a busy machine a start takes long
    launcher.write_text(launcher.read_text().replace("START_SECONDS = 15", "START_SECONDS = 60"))
    launched = launch(root=clone, **environ).ready()
    with clients(launched):
        for number, (name, (mistake, kind)) in enumerate(FAULTS.items(), 1):
            path = clone / name
            original = path.read_text()
            replace(path, f"{original}{mistake}\n")
            wait_until(lambda: len(errors_of(launched)) == number)  # noqa: B023
            place = f"{name}:{original.count(chr(10)) + 1}: {kind}" if kind else "it ended; see its output above"
            assert errors_of(launched)[-1].startswith(f"the new code does not start: {place}")
            assert f"\nmake run: the new code does not start: {place}" in launched.on_stderr()
            assert f'"version":"good-{number - 1}"' in read_version(launched) or number == 1
            replace(path, original)
            patch_version(clone, f"good-{number}")
            wait_until(lambda: f'"version":"good-{number}"' in read_version(launched))  # noqa: B023
    assert len(errors_of(launched)) == len(FAULTS)
    assert "Traceback" not in launched.on_stdout().replace("    Traceback", "")


def test_a_start_that_hangs_is_given_up(launch: Launch, clone: Path, environ: dict[str, str]) -> None:
    launched = launch(root=clone, **environ).ready()
    source = clone / "wsgi.py"
    original = source.read_text()
    with clients(launched):
        replace(source, f"import time\ntime.sleep(1000)\n{original}")
        wait_until(lambda: errors_of(launched))
        (message,) = errors_of(launched)
        assert message.startswith("the new code does not start: wsgi.py:2: StartTimeout: it is not ready after 15 s")
        patch_version(clone, "new")
        replace(source, original)
        wait_until(lambda: '"version":"new"' in read_version(launched))


def test_a_save_is_served_by_all_workers_and_on_connections_that_are_kept(
    launch: Launch, clone: Path, environ: dict[str, str]
) -> None:
    launched = launch(root=clone, **{**environ, "WEB_CONCURRENCY": "2"}).ready()
    with requests.Session() as session, clients(launched):
        assert session.get(f"{launched.url}/version", timeout=WAIT_SECONDS).ok
        patch_version(clone, "new")
        wait_until(lambda: "reloaded in" in launched.printed())
        wait_until(lambda: '"version":"new"' in session.get(f"{launched.url}/version", timeout=WAIT_SECONDS).text)
        assert all('"version":"new"' in read_version(launched) for _ in range(50))
        wait_until(lambda: len(launched.family("dev.reload")) == 4)  # itself, a master and its two workers


def test_saves_in_one_second_are_served_one_after_the_other(
    launch: Launch, clone: Path, environ: dict[str, str]
) -> None:
    launched = launch(root=clone, **environ).ready()
    for version in ("one", "two", "six"):
        patch_version(clone, version)
        os.utime(clone / "settings.py", (2_000_000_000, 2_000_000_000))
        wait_until(lambda: f'"version":"{version}"' in read_version(launched))  # noqa: B023


def test_what_means_the_same_restarts_nothing(launch: Launch, clone: Path, environ: dict[str, str]) -> None:
    launched = launch(root=clone, **environ).ready()
    processes = {process.pid for process in launched.family("dev.reload")}
    settings = clone / "settings.py"
    for path in (settings, clone / "tests/harness.py", clone / "bench/load.py", clone / "dev/trace.py"):
        replace(path, f"# a comment\n\n{path.read_text()}\n\n")
    (clone / "README.md").write_text("new\n")
    (clone / "blueprints/notes.txt").write_text("new\n")
    os.utime(clone / "errors.py", (2**31, 2**31))  # from a machine whose clock is ahead
    (clone / ".#settings.py").symlink_to("somebody@somewhere.1:2")  # how Emacs marks what it edits
    with pytest.raises(AssertionError):
        wait_until(lambda: {process.pid for process in launched.family("dev.reload")} != processes, 1)
    page = clone / "blueprints/web_login.html"
    replace(page, f"{page.read_text()} ")
    wait_until(lambda: "reloaded in" in launched.printed())
    (line,) = re.findall(r"make run: reloaded in [\d.]+ s: (.*)", launched.printed())
    assert line == "blueprints/web_login.html"


MIGRATION = """
from alembic import op

revision = "9999"
down_revision = "{last}"


def upgrade() -> None:
    op.execute("CREATE TABLE added (id INTEGER)")
"""


def test_migrations_run_if_they_have_changed(
    launch: Launch, clone: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    launched = launch(root=clone, **{**environ, "DATABASE_URL": f"sqlite:///{tmp_path}/own.db"}).ready()
    versions = clone / "storage/migrations/versions"
    (last,) = re.findall(r'^revision = "(.*)"', max(versions.glob("*.py")).read_text(), re.MULTILINE)
    good = MIGRATION.format(last=last)
    patch_version(clone, "new")
    wait_until(lambda: '"version":"new"' in read_version(launched))
    assert "all migrations" not in launched.printed()

    replace(versions / "9999_added.py", good.replace("op.execute(", "no_such_name("))
    place = (
        f"storage/migrations/versions/9999_added.py:{good[: good.index('op.execute')].count(chr(10)) + 1}: NameError"
    )
    wait_until(lambda: f"\nmake run: the database cannot be migrated: {place}" in launched.printed())
    wait_until(lambda: any(place in message for message in errors_of(launched)))
    assert '"version":"new"' in read_version(launched)

    replace(versions / "9999_added.py", good)
    wait_until(lambda: "make run: the database has all migrations" in launched.printed())
    with closing(sqlite3.connect(tmp_path / "own.db")) as database:
        assert database.execute("SELECT * FROM added").fetchall() == []
    assert launched.printed().count("reloaded in") == 1


LAST_WORDS = """
import atexit, fcntl, logging, os, sys
def say_goodbye():
    logging.shutdown()
    fcntl.lockf(1, fcntl.LOCK_EX)  # as the log does
    for number in range(2000):
        sys.stdout.write('{"level": "INFO", "message": "goodbye %d %s"}\\n' % (number, "x" * 100))
    sys.stdout.flush()
    fcntl.lockf(1, fcntl.LOCK_UN)
if __name__ == "wsgi":
    atexit.register(say_goodbye)
"""


def test_no_line_is_lost_by_a_reload_or_a_stop(launch: Launch, clone: Path, environ: dict[str, str]) -> None:
    """Each process ends with more than a pipe holds."""
    source = clone / "wsgi.py"
    source.write_text(source.read_text() + LAST_WORDS)
    # On a busy machine an orderly end takes longer than it is given.
    for name, impatient, patient in (
        ("run", "STOP_SECONDS = 5", "STOP_SECONDS = 60"),
        ("reload", "STOP_SECONDS = 2", "STOP_SECONDS = 60"),
    ):
        path = clone / "dev" / f"{name}.py"
        path.write_text(path.read_text().replace(impatient, patient))
    launched = launch(root=clone, **environ).ready()
    ids = [launched.request_trace_id() for _ in range(20)]
    patch_version(clone, "new")
    wait_until(lambda: '"version":"new"' in read_version(launched))
    ids += [launched.request_trace_id() for _ in range(20)]
    launched.popen.send_signal(signal.SIGQUIT)
    assert launched.popen.wait(WAIT_SECONDS) == 0
    for text in (launched.kept(), launched.printed()):
        assert [trace_id for trace_id in ids if trace_id[:8] not in text] == []
        goodbyes = [int(number) for number in re.findall(r"goodbye (\d+) x{100}(?:\"}|)$", text, re.MULTILINE)]
        assert sorted(goodbyes) == sorted(list(range(2000)) * 4)  # a master and a worker, twice
    assert all(line.startswith("{") for line in launched.kept().splitlines())


def test_a_document_that_is_saved_is_served(launch: Launch, clone: Path, environ: dict[str, str]) -> None:
    launched = launch(root=clone, **environ).ready()
    replace(clone / "openapi.en.json", '{"new": true}')
    url = f"{launched.url}/openapi.json?lang=en"
    wait_until(lambda: requests.get(url, timeout=WAIT_SECONDS).text == '{"new": true}')


def test_a_service_that_dies_is_started_again(launch: Launch, clone: Path, environ: dict[str, str]) -> None:
    launched = launch(root=clone, **environ).ready()
    reloader = launched.family("dev.reload")[0]
    (master,) = reloader.children()
    master.kill()
    again = "make run: the service has died; starting it again\n"
    wait_until(lambda: again in launched.printed())
    wait_until(lambda: read_version(launched))
    reloader.kill()
    wait_until(lambda: launched.printed().count(again) == 2)
    wait_until(lambda: read_version(launched))
    patch_version(clone, "new")
    wait_until(lambda: '"version":"new"' in read_version(launched))
    assert psutil.wait_procs([master, reloader], WAIT_SECONDS)[1] == []


def test_code_that_does_not_start_at_first_ends_the_launch(
    launch: Launch, clone: Path, environ: dict[str, str]
) -> None:
    source = clone / "wsgi.py"
    source.write_text(f"import no_such_module\n{source.read_text()}")
    launched = launch(root=clone, **environ)
    assert launched.popen.wait(WAIT_SECONDS) == 1
    assert "make run: the new code does not start: wsgi.py:1: ModuleNotFoundError" in launched.printed()
    assert launched.printed().endswith("make run: the service did not start; see its output above\n")


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("x = 1", "x = 1  # one\n\n", True),
        ("x = f(1, 2)", "x = f(\n    1,\n    2,\n)", True),
        ("x = 1", "x = 2", False),
        ('"""Shown in /docs."""', '"""Shown in /docs!"""', False),
        ("x = 1", "x = (", False),
        ("x = (", "x = (", True),
        ("x = (", "x = ((", False),
        ("x = 1", "\0", False),
        (None, "x = 1", False),
        ("x = 1", None, False),
        (None, None, True),
    ],
)
def test_two_texts_mean_the_same(old: str | None, new: str | None, same: bool) -> None:
    sources = [
        None if text is None else Source((number, 0, 0), text.encode()) for number, text in enumerate((old, new))
    ]
    assert means_the_same(Path("x.py"), *sources) is same


def test_the_bytes_of_a_template_count() -> None:
    assert not means_the_same(Path("x.html"), Source((0, 0, 0), b"x"), Source((1, 0, 0), b"x "))


def test_none_of_the_code_is_imported_before_it_is_forked() -> None:
    """No reload would replace it."""
    script = "import sys, dev.reload; dev.reload.import_libraries(dev.reload.look({})); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert imported & {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in look({})} == set()
    assert {"flask", "gunicorn", "redis", "sqlalchemy"} <= imported
