"""The service with a handler that ends its process if a text says so: `gunicorn tests.apps.fragile_handler:app`.

What a dead process leaves is claimed after 4 s.
"""

import os
import signal
import time
from typing import Any

from redis.exceptions import RedisError

from blueprints.message_handlers import on
from storage import message_queue
from storage.redis_client import redis
from wsgi import app

__all__ = ["app"]

message_queue.CLAIM_MILLISECONDS = 4000
message_queue.POLL_SECONDS = 1


@on("text")
def take_a_while(message: dict[str, Any]) -> None:
    redis.rpush("begun", message["MsgId"])
    if message["Content"] == "die":
        time.sleep(0.5)  # its lines so far are written
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(message["Content"]))
    while True:
        try:
            redis.rpush("handled", message["MsgId"])
        except RedisError:
            time.sleep(0.1)
        else:
            return
