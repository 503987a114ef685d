"""The service that has spoken with Redis, and sent a span of it, before gunicorn forks: for `--preload`."""

from storage.redis_client import redis
from telemetry import traces
from wsgi import app

__all__ = ["app"]

with app.app_context():
    redis.ping()
traces._provider.force_flush()  # type: ignore[attr-defined]
