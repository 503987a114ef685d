"""The databases of the tests: SQLite files, or a private MariaDB that may be killed and restarted."""

import atexit
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pymysql

from tests.harness import bound_to_this_process

START_SECONDS = STOP_SECONDS = 60
LOG_FILE_SIZE = "8M"


def executable(name: str) -> str:
    """Return the path of a MariaDB program; Debian has the server outside of an ordinary user's PATH.

    :raises FileNotFoundError: if it is not installed.
    """
    found = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if not found:
        raise FileNotFoundError(f"--database=mariadb needs {name}: apt-get install mariadb-server")
    return found


@cache
def _empty_data() -> Path:
    """The data of a new server, to be copied: installing them takes seconds."""
    folder = tempfile.mkdtemp(prefix="kuaishang-mariadb-")
    atexit.register(shutil.rmtree, folder)
    data = Path(folder) / "data"
    command = [executable("mariadb-install-db"), *_common_options(data), "--auth-root-authentication-method=normal"]
    command += ["--skip-test-db", f"--innodb-log-file-size={LOG_FILE_SIZE}"]
    env = {**os.environ, "TMPDIR": folder}
    subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return data


def _common_options(data: Path) -> list[str]:
    as_root = ["--user=root"] if os.geteuid() == 0 else []  # as root it runs only with this option
    return ["--no-defaults", f"--datadir={data}", *as_root]


class SQLiteFiles:
    """SQLite databases in this folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """There is no process."""

    close = stop

    def create(self) -> str:
        """Return the URL of a new, empty database."""
        return f"sqlite:///{self.folder / f'{secrets.token_hex(4)}.db'}"

    def at_rest(self) -> bytes:
        """Return the contents of all files."""
        return _contents(self.folder)


class MariaDB:
    """A mariadbd process with its data in this folder, on a socket that only this user can open, and on no port.

    :param options: further options of the server.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self._options = options
        # Not beside the data: the path of a socket has at most about 100 characters.
        self._socket_folder = tempfile.TemporaryDirectory(prefix="kuaishang-")
        self.socket = f"{self._socket_folder.name}/mariadb.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, with the existing data if any, and wait until it responds.

        :raises RuntimeError: if it does not respond in time.
        """
        common = _common_options(self.folder / "data")
        log = self.folder / "mariadb.log"
        # A folder for each server: one that starts removes the temporary tables of another one in the same folder.
        temporary = self.folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "TMPDIR": str(temporary)}
        if not (self.folder / "data").exists():
            shutil.copytree(_empty_data(), self.folder / "data")
        options = {
            "socket": self.socket,
            "log-error": str(log),
            # A commit survives a killed server. It need not survive the machine, so nothing waits for the disk.
            "innodb-flush-log-at-trx-commit": "1",
            "innodb-flush-method": "nosync",
            "innodb-log-file-size": LOG_FILE_SIZE,
            "innodb-buffer-pool-size": "32M",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [*bound_to_this_process(), executable("mariadbd"), *common, "--skip-networking", *words, *self._options],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._listens():
                self.execute("DO 1")  # before it responds, it ignores a SIGTERM
                return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"mariadbd did not start; see {log}")

    def _listens(self) -> bool:
        # Not with PyMySQL, which leaves its socket open if it cannot connect.
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.socket)
            return True
        return False

    def stop(self) -> None:
        """Stop the server; all writes are in its files when this returns."""
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            finally:
                self.kill()

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Stop the server and remove its socket."""
        self.stop()
        self._socket_folder.cleanup()

    def create(self) -> str:
        """Create an empty database, and return its URL."""
        name = f"kuaishang_{secrets.token_hex(4)}"
        self.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        return f"mysql://root@localhost/{name}?unix_socket={self.socket}"

    def at_rest(self) -> bytes:
        """Return the contents of all files; stop the server first."""
        return _contents(self.folder)

    def execute(self, statement: str) -> Any:
        """Run a statement as an administrator, and return the first row of its result, if any."""
        with pymysql.connect(unix_socket=self.socket, user="root") as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone()


Databases = SQLiteFiles | MariaDB


def _contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
