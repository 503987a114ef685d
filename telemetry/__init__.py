"""Logs and trace ids. Imports nothing of the service's other parts."""

from flask import Flask

from telemetry import access_log, logs


def init_app(app: Flask) -> None:
    """Write JSON lines to stdout, one of them for each request; give each request a trace id."""
    logs.configure(app.config["LOG_LEVEL"])
    access_log.init_app(app)
