"""Measurements, each a ratio within one run."""

import base64
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from dev.redis_server import RedisServer
from tests.harness import APP_ID, migrate


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """What the service needs: a Redis of its own, and a migrated database, on SQLite unless DATABASE_URL is set."""
    with tempfile.TemporaryDirectory() as folder, closing(RedisServer(Path(folder) / "redis")) as redis:
        redis.start()
        url = os.environ.get("DATABASE_URL") or f"sqlite:///{folder}/bench.db"
        migrate(url)
        yield {
            "WECHAT_APP_ID": APP_ID,
            "WECHAT_APP_SECRET": "unused",
            "REDIS_URL": redis.url,
            "DATABASE_URL": url,
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": base64.b64encode(secrets.token_bytes(32)).decode(),
        }
