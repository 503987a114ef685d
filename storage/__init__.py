"""What outlives a request: sessions in Redis, rows in a database, and the keys that encrypt personal data."""

from flask import Flask

from storage import database, rate_limits, redis_client, sessions
from storage.cipher import Cipher
from telemetry import traces


def init_app(app: Flask) -> None:
    redis_client.init_app(app)
    app.extensions["cipher"] = Cipher(app.config["ENCRYPTION_KEYS"])
    database.init_app(app)
    traces.init_app(app)  # now that there are the commands of which spans are made
    sessions.init_app(app)
    rate_limits.init_app(app)
