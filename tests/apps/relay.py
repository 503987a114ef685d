"""The service with a route that calls another service, at RELAY_TO: `gunicorn tests.apps.relay:app`."""

import os

import requests

from storage.redis_client import redis
from telemetry.traces import outgoing_headers
from wsgi import app

__all__ = ["app"]


@app.get("/relay")
def relay() -> dict[str, int]:
    redis.ping()
    answer = requests.get(os.environ["RELAY_TO"], headers=outgoing_headers(), timeout=5)
    return {"status": answer.status_code}
