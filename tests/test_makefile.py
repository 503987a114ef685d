"""`make test` and `make smoke` run all of their parts, and fail if one of them does."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

FAKE_PYTHON = """#!/bin/sh
echo "$*"
case "$*" in *--last-failed*) exit $AGAIN;; *--database=mariadb*) exit $MARIADB;; *) exit $SQLITE;; esac
"""
AGAIN = "--last-failed --maxfail=3"


def make_test(folder: Path, *words: str, sqlite: int, mariadb: int, again: int = 0) -> tuple[bool, list[str]]:
    """Run `make test` with a pytest that ends so.

    :param again: how what failed ends when it runs once more.
    :returns: whether it passed, and the arguments of each pytest after those that are always the same.
    """
    (folder / "bin").mkdir()
    for name, script in (("python", FAKE_PYTHON), ("mariadbd", "#!/bin/sh")):
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "SQLITE": str(sqlite), "MARIADB": str(mariadb), "AGAIN": str(again)}
    command = ["make", f"VENV={folder}", f"--assume-old={folder}/installed", "test", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    runs = [line.removeprefix("-m pytest").strip() for line in done.stdout.splitlines() if line.startswith("-m pytest")]
    return done.returncode == 0, [run.removeprefix("--numprocesses 3 --dist loadfile").strip() for run in runs]


@pytest.mark.parametrize(
    ("sqlite", "mariadb", "passes"),
    [(0, 0, True), (1, 0, False), (0, 1, False), (0, 5, True), (5, 5, False)],
)
def test_make_test_runs_both_halves(tmp_path: Path, sqlite: int, mariadb: int, passes: bool) -> None:
    runs = ["-k login", "--database=mariadb -k login"]
    assert make_test(tmp_path, "ARGS=-k login", sqlite=sqlite, mariadb=mariadb) == (passes, runs)


@pytest.mark.parametrize(
    ("sqlite", "mariadb", "again", "passes", "runs"),
    [
        (1, 0, 0, True, ["", AGAIN, "--database=mariadb"]),
        (1, 0, 1, False, ["", AGAIN, "--database=mariadb"]),
        (0, 1, 0, True, ["", "--database=mariadb", f"--database=mariadb {AGAIN}"]),
        (0, 1, 1, False, ["", "--database=mariadb", f"--database=mariadb {AGAIN}"]),
        (2, 0, 0, False, ["", "--database=mariadb"]),
    ],
)
def test_what_fails_in_the_whole_suite_runs_once_more(
    tmp_path: Path, sqlite: int, mariadb: int, again: int, passes: bool, runs: list[str]
) -> None:
    assert make_test(tmp_path, sqlite=sqlite, mariadb=mariadb, again=again) == (passes, runs)


@pytest.mark.parametrize("failing", ["", "ruff check", "ruff format", "dev.compatibility", "check.py", "pytest"])
def test_make_smoke_passes_what_passes_each_check(tmp_path: Path, failing: str) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python", "ruff"):
        script = f'#!/bin/sh\ncase "{name} $*" in *"{failing or "nothing"}"*) exit 1;; esac\n'
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    command = ["make", f"VENV={tmp_path}", f"--assume-old={tmp_path}/installed", "smoke", "ARGS=--old=x"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert (done.returncode == 0) == (not failing), done.stdout
    if not failing:
        assert f"{tmp_path}/bin/python deploy/patch/check.py --old=x\n" in done.stdout
        tests = [word for word in done.stdout.split() if word.startswith("tests/")]
        assert len(tests) == 6
        assert [name for name in tests if not (ROOT / name).is_file()] == []
