"""`make test` runs both halves, and fails if one of them does."""

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
