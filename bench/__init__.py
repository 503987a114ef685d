"""Measurements, each a ratio within one run."""

import base64
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from dev.redis_server import RedisServer
from service import create_app
from storage import database, sessions
from storage.identities import get_or_create_user
from tests.harness import APP_ID, migrate

SERVER_CORE, LOAD_CORE = "0", "1"
WIDE_LIMITS = dict.fromkeys(("LOGIN_RATE", "APP_LOGIN_RATE", "SESSION_RATE"), "10000000/minute")
"""Counted, but never reached: the load is that of one client and a few sessions."""
GO = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode"}
"""By which go finds the libraries of Debian's packages."""


def pinned(core: str) -> list[str]:
    """Words before a command that keep its process on one core; none where there is only one."""
    return ["taskset", "--cpu-list", core] if (os.cpu_count() or 1) > 1 else []


def pin_load() -> None:
    """Keep this process, and those that it starts from now on, off the server's core."""
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {int(LOAD_CORE)})


def sign_in(environ: dict[str, str], count: int) -> list[str]:
    """Create so many users with a phone number, and return a token of each."""
    tokens = []
    app = create_app({**environ, "LOG_LEVEL": "ERROR"})
    for number in range(count):
        with app.test_request_context():
            user = get_or_create_user(APP_ID, f"o-bench-{number:04}", None)
            user.phone = "13812345678"
            database.session.commit()
            tokens.append(sessions.log_in(user.id))
    return tokens


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """What the service needs: a Redis of its own, and a migrated database, on SQLite unless DATABASE_URL is set."""
    with tempfile.TemporaryDirectory() as folder, closing(RedisServer(Path(folder) / "redis")) as redis:
        redis.start()
        url = os.environ.get("DATABASE_URL") or f"sqlite:///{folder}/bench.db"
        migrate(url)
        yield {
            **WIDE_LIMITS,
            "ENV_FILE": os.devnull,
            "WECHAT_APP_ID": APP_ID,
            "WECHAT_APP_SECRET": "unused",
            "REDIS_URL": redis.url,
            "DATABASE_URL": url,
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": base64.b64encode(secrets.token_bytes(32)).decode(),
        }
