"""`make test` and `make smoke` run all of their parts, and fail if one of them does."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

FAKE_PYTHON = """#!/bin/sh
echo "$*"
case "$*" in *--database=mariadb*) exit $MARIADB;; *) exit $SQLITE;; esac
"""


@pytest.mark.parametrize(
    ("sqlite", "mariadb", "passes"),
    [(0, 0, True), (1, 0, False), (0, 1, False), (0, 5, True), (5, 5, False)],
)
def test_make_test_runs_both_halves(tmp_path: Path, sqlite: int, mariadb: int, passes: bool) -> None:
    (tmp_path / "bin").mkdir()
    for name, script in (("python", FAKE_PYTHON), ("mariadbd", "#!/bin/sh")):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}",
        "SQLITE": str(sqlite),
        "MARIADB": str(mariadb),
    }
    command = ["make", f"VENV={tmp_path}", f"--assume-old={tmp_path}/installed", "test", "ARGS=-k login"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert [line.partition("loadfile ")[2] for line in done.stdout.splitlines()] == [
        "-k login",
        "--database=mariadb -k login",
    ]
    assert (done.returncode == 0) == passes


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
