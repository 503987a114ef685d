"""Logs, traces and metrics. Imports nothing of the service's other parts."""

import os

from flask import Flask


def init_app(app: Flask) -> None:
    """Give each request a trace id, a log line, its metrics and, where a collector is named, its spans."""
    # Imported here: gunicorn's master reads this package for its own lines, and must not count what workers count.
    from telemetry import access_log, instance_directory, logs, metrics, redaction, traces

    redaction.hide_settings(app.config)
    logs.configure(app.config["LOG_LEVEL"], app.config["INSTANCE"], app.config["VERSION"], metrics.LINES_DROPPED.inc)
    metrics.BUILD.labels(app.config["VERSION"]).set(1)
    if instance_directory.VARIABLE not in os.environ:  # else it started when gunicorn's master did
        metrics.START_TIME.set_to_current_time()
    traces.init_app(app)
    access_log.init_app(app)
