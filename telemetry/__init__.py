"""Logs, traces and metrics. Imports nothing of the service's other parts."""

from flask import Flask

from telemetry import access_log, logs, metrics, redaction


def init_app(app: Flask) -> None:
    """Give each request a trace id, a log line and its metrics; `traces.init_app` comes when there is a database."""
    redaction.hide_settings(app.config)
    logs.configure(app.config["LOG_LEVEL"], app.config["INSTANCE"], app.config["VERSION"])
    metrics.BUILD.labels(app.config["VERSION"], app.config["INSTANCE"]).set(1)
    access_log.init_app(app)
