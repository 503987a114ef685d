"""The program of deploy/backup, with a pair of keys of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness import ROOT

AGE = shutil.which("age")


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
