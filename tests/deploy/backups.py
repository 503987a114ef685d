"""The programs of deploy/backup: the backups with a pair of keys of their own, and the copy of the binary log."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.harness import ROOT, bound_to_this_process, wait_until

AGE = shutil.which("age")
FOLDER = ROOT / "deploy" / "backup"
README = (FOLDER / "README.md").read_text()


def section(name: str) -> list[str]:
    """Return the lines of a file of MariaDB's options in README.md."""
    found = re.search(rf"(?m)^    \[{name}\]\n((?:    .+\n)+)", README)
    assert found
    return [line.strip() for line in found[1].splitlines()]


def statements(user: str) -> list[str]:
    """Return the SQL in README.md that makes a user and grants what it may do, of any host, as `user`@localhost."""
    found = re.findall(rf'(?m)^    mariadb -e "((?:CREATE|GRANT) .*\b{user}@.+)"$', README)
    return [re.sub(rf"{user}@\S+", f"{user}@localhost", line) for line in found]


class Backups:
    """Backups of a database in a folder.

    :param folder: for them, the keys and the file of settings.
    """

    def __init__(self, folder: Path, database_url: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files, self.identity, self.recipients = folder / "files", folder / "key", folder / "key.pub"
        self._env_file = folder / "env"
        self.use(database_url)
        made = subprocess.run(["age-keygen", "--output", self.identity], check=True, capture_output=True, text=True)
        self.recipients.write_text(made.stderr.rpartition(" ")[2])

    def use(self, database_url: str) -> None:
        """Be about another database."""
        self._env_file.write_text(f"DATABASE_URL={database_url}\n")

    def run(self, command: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        program = [sys.executable, str(ROOT / "deploy/backup/backup.py"), command]
        more = [] if command == "verify" else ["--env-file", self._env_file]
        environ = {"PATH": os.environ["PATH"]}
        return subprocess.run([*program, *words, *more], env=environ, capture_output=True, text=True)

    def make(self, *more: str) -> Path:
        """Make a backup and return its file."""
        return self.files / Path(self._done("make", "--to", self.files, "--recipients", self.recipients, *more)).name

    def restore(self, file: Path, *more: str) -> None:
        self._done("restore", file, "--identity", self.identity, *more)

    def _done(self, *words: Any) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition(":")[0]


class BinlogCopy:
    """The process of the unit that copies the binary log, not running at first.

    :param folder: for the copies, which begin with binlog.000001, and more.
    :param options: lines in place of those of binlog.cnf.
    :param seconds: between its checks.
    """

    def __init__(self, folder: Path, options: list[str], seconds: int) -> None:
        self.files, self._options = folder / "copies", folder / "binlog.cnf"
        self.files.mkdir(parents=True)
        (self.files / "binlog.000001").touch()
        self.configure(options)
        (line,) = re.findall(r"(?m)^ExecStart=(.+)$", (FOLDER / "kuaishang-binlog.service").read_text())
        line = line.replace("/opt/kuaishang", str(ROOT)).replace("/etc/kuaishang/binlog.cnf", str(self._options))
        self._command = [*bound_to_this_process(), *shlex.split(line), str(seconds)]
        self._told = folder / "told"  # instead of systemd
        self._told.touch()
        notify = folder / "bin" / "systemd-notify"
        notify.parent.mkdir()
        notify.write_text(f'#!/bin/sh\necho "$@" >>{self._told}\n')
        notify.chmod(0o755)
        self._env = {"PATH": f"{notify.parent}{os.pathsep}{os.environ['PATH']}"}
        self._process: subprocess.Popen[bytes] | None = None
        self._output = folder / "output"

    def configure(self, options: list[str]) -> None:
        self._options.write_text("\n".join(["[client]", *options, ""]))

    def start(self) -> None:
        self.kill()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                self._command, cwd=self.files, env=self._env, stdout=output, stderr=output, start_new_session=True
            )

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kill all of its processes, as systemd does."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def is_active(self) -> bool:
        """Whether it has said that the copy is whole."""
        return self._told.read_text().splitlines()[-1:] == ["--ready"]

    def wait_until_whole(self) -> None:
        """Wait until it says once more that the copy is whole; it is started whenever it has ended."""
        self._told.write_text("")

        def whole() -> bool:
            if not self.running():
                self.start()
            return self.is_active()

        wait_until(whole)

    def output(self) -> str:
        return self._output.read_text()
