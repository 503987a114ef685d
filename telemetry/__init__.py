"""Logs, traces and metrics. Imports nothing of the service's other parts."""

from flask import Flask

from telemetry import access_log, logs, metrics, redaction, traces


def init_app(app: Flask) -> None:
    """Give each request a trace id, a log line, its metrics and, if a collector is set, its spans."""
    redaction.hide_settings(app.config)
    logs.configure(app.config["LOG_LEVEL"], app.config["INSTANCE"], app.config["VERSION"])
    metrics.BUILD.labels(app.config["VERSION"], app.config["INSTANCE"]).set(1)
    traces.init_app(app)
    access_log.init_app(app)
