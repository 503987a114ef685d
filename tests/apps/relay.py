"""The service with a route that calls another service, at RELAY_TO: `gunicorn tests.apps.relay:app`.

It handles the messages of the other one, whichever takes them.
"""

import os

import requests
from opentelemetry import propagate

from storage.redis_client import redis
from tests.apps import slow_handler
from wsgi import app

__all__ = ["app", "slow_handler"]


@app.get("/relay")
def relay() -> dict[str, int]:
    redis.ping()
    headers: dict[str, str] = {}
    propagate.inject(headers)
    answer = requests.get(os.environ["RELAY_TO"], headers=headers, timeout=5)
    return {"status": answer.status_code}
