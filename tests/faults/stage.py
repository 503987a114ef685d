"""All that the service needs, each where it can be broken."""

import base64
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from redis import Redis
from sqlalchemy import make_url

from bench import WIDE_LIMITS
from dev.redis_server import RedisServer
from tests.databases import MariaDB, SQLiteFiles
from tests.harness import APP_ID, APP_SECRET, METRICS_TOKEN, Service, Simulator, bound_to_this_process, migrate
from tests.proxy import Proxy

REQUEST_SECONDS, SLOW_CLIENT_SECONDS = 4, 2
DISK = "256m"


def can_mount() -> bool:
    return os.geteuid() == 0 and not subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode


class Stage:
    """Redis and WeChat behind proxies, a database on a disk of its own, and the service, with two workers.

    :param stack: ends it all.
    :param mariadb: instead of SQLite.
    :param database_url: of a migrated database, instead of one on that disk.
    """

    def __init__(self, stack: ExitStack, mariadb: bool, database_url: str = "") -> None:
        self._stack = stack
        self.mariadb = mariadb
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.redis = stack.enter_context(closing(RedisServer(self.folder / "redis", bound_to_this_process())))
        self.redis.start()
        self.redis_proxy = stack.enter_context(Proxy(self.redis.socket))
        self.simulator = Simulator(self.folder / "simulator")
        stack.callback(self.simulator.process.kill)
        self.simulator_port = int(self.simulator.url.rpartition(":")[2])
        self.wechat = stack.enter_context(Proxy(("127.0.0.1", self.simulator_port)))
        self.disk = self.folder / "databases"
        self.disk.mkdir()
        if can_mount():
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", self.disk], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", self.disk], check=True)
        self.database = MariaDB(self.disk / "data") if mariadb else SQLiteFiles(self.disk)
        stack.enter_context(closing(self.database))
        if not database_url:
            self.database.start()
        self.database_url = database_url or self._create()
        self.environ = {
            **WIDE_LIMITS,
            "WECHAT_APP_ID": APP_ID,
            "WECHAT_APP_SECRET": APP_SECRET,
            "WECHAT_API_BASE_URL": f"http://127.0.0.1:{self.wechat.port}",
            "REDIS_URL": f"redis://127.0.0.1:{self.redis_proxy.port}/0",
            "DATABASE_URL": self.database_url,
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": base64.b64encode(secrets.token_bytes(32)).decode(),
            "METRICS_TOKEN": METRICS_TOKEN,
            "DRAIN_SECONDS": "0",
            "REQUEST_SECONDS": str(REQUEST_SECONDS),
            "HEAD_SECONDS": str(SLOW_CLIENT_SECONDS),
            "BODY_SECONDS": str(SLOW_CLIENT_SECONDS),
        }
        self.service: Service | None = None
        stack.callback(self._discard)
        self._serves: object = None

    def patient(self) -> dict[str, str]:
        """Return the settings for a test that reloads or patches: a busy machine is no fault there."""
        redis_url = f"{self.environ['REDIS_URL']}?socket_timeout=5&socket_connect_timeout=5"
        return {**self.environ, "REDIS_URL": redis_url, "REQUEST_SECONDS": "10", "HEAD_SECONDS": "10"}

    def _create(self) -> str:
        url = self.database.create()
        migrate(url)
        if isinstance(self.database, MariaDB):
            # Not as an administrator, for whom a full or read-only server still has room.
            self.database.execute("CREATE USER app@localhost IDENTIFIED BY 'app-password'")
            self.database.execute(f"GRANT ALL ON {make_url(url).database}.* TO app@localhost")
            url = url.replace("mysql://root@", "mysql://app:app-password@")
        return url

    def serve(self, module: str = "wsgi", within: Sequence[str] = (), **different: str) -> Service:
        """Return the service so started: the running one, if it was started so."""
        wanted = (module, tuple(within), different)
        if self.service is None or wanted != self._serves:
            self._discard()
            environ, output = {**self.environ, **different}, self.folder / f"output-{secrets.token_hex(4)}"
            self.service = Service(environ, output, module, within)
            self._serves = wanted
        return self.service

    def _discard(self) -> None:
        if self.service:
            self.service.discard()

    @contextmanager
    def redis_client(self) -> Iterator[Redis]:
        """Yield a client that is not behind the proxy."""
        with Redis.from_url(self.redis.url) as client:
            yield client
