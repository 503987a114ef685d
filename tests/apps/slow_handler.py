"""The service with a handler that takes as many seconds as its message says: `gunicorn tests.apps.slow_handler:app`."""

import time
from typing import Any

from blueprints.message_handlers import on
from storage.redis_client import redis
from wsgi import app

__all__ = ["app"]


@on("text")
def take_a_while(message: dict[str, Any]) -> None:
    time.sleep(float(message["Content"]))
    redis.rpush("handled", message["MsgId"])
