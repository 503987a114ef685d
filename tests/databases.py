"""Where the tests' databases lie: files of SQLite's, or a private MariaDB that may be killed and started again."""

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

import pymysql

from tests.harness import bound_to_this_process

START_SECONDS = STOP_SECONDS = 60
LOG_FILE_SIZE = "8M"


def executable(name: str) -> str:
    """A program of MariaDB's; Debian keeps the server where an ordinary user's PATH does not lead.

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
    """Databases that are files in this folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Nothing runs."""

    close = stop

    def create(self) -> str:
        """Make room for an empty database, and answer its URL."""
        return f"sqlite:///{self.folder / f'{secrets.token_hex(4)}.db'}"

    def at_rest(self) -> bytes:
        """All that the databases have in their files."""
        return _contents(self.folder)


class MariaDB:
    """A mariadbd process with its data in this folder, on a socket that nobody else can open, and on no port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Not beside the data: a socket's path may have about 100 characters.
        self._socket_folder = tempfile.TemporaryDirectory(prefix="kuaishang-")
        self.socket = f"{self._socket_folder.name}/mariadb.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, on the data that are there or else on none, and wait until it answers.

        :raises RuntimeError: if it does not answer in time.
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
            # What a commit has written outlives the server that is killed; nothing here has to outlive the machine,
            # so nobody waits for the disk.
            "innodb-flush-log-at-trx-commit": "1",
            "innodb-flush-method": "nosync",
            "innodb-log-file-size": LOG_FILE_SIZE,
            "innodb-buffer-pool-size": "32M",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [*bound_to_this_process(), executable("mariadbd"), *common, "--skip-networking", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._listens():
                self._execute("DO 1")  # before it answers, it does not hear that it is to stop
                return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"mariadbd did not start; see {log}")

    def _listens(self) -> bool:
        # Not with PyMySQL, which leaves the socket open over which it could not connect.
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.socket)
            return True
        return False

    def stop(self) -> None:
        """Stop the server; all that it was told is in its files when this returns."""
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            finally:
                self.kill()

    def kill(self) -> None:
        """End the server as a crash would, in the middle of whatever it is doing."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Stop the server and remove its socket."""
        self.stop()
        self._socket_folder.cleanup()

    def create(self) -> str:
        """Make an empty database, and answer its URL."""
        name = f"kuaishang_{secrets.token_hex(4)}"
        self._execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        return f"mysql://root@localhost/{name}?unix_socket={self.socket}"

    def at_rest(self) -> bytes:
        """All that the server, which must be stopped, has in its files."""
        return _contents(self.folder)

    def _execute(self, statement: str) -> None:
        with pymysql.connect(unix_socket=self.socket, user="root") as connection, connection.cursor() as cursor:
            cursor.execute(statement)


Databases = SQLiteFiles | MariaDB


def _contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
