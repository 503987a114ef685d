"""Probes: is the process alive, can it serve, which version does it run; and the metrics that Prometheus scrapes."""

import os
from typing import Any

from flask import Response, current_app, request
from marshmallow import Schema, fields
from prometheus_client.exposition import choose_encoder

import wechat
from blueprints.api import Blueprint
from blueprints.policies import METRICS_TOKEN_WRONG
from concurrency import in_parallel
from errors import ApiError, Code, Message
from storage import database, failures, redis_client
from telemetry import metrics, multiprocess

CHECK_SECONDS = 0.7
"""How long Redis and the database may take; with everything around it, a probe takes less than a second."""

blueprint = Blueprint("health", __name__, description="探针 Probes")
scraped = Blueprint("metrics", __name__, description="指标 Metrics")


def failing_dependencies() -> dict[str, list[str]]:
    """Check Redis and the database at the same time, and record in the metrics which are up.

    :returns: what is wrong, by dependency, after at most CHECK_SECONDS; empty if all is well.
    """
    down = {}
    for name, outcome in in_parallel({"redis": redis_client.ping, "database": database.ping}, CHECK_SECONDS).items():
        metrics.DEPENDENCY_UP.labels(name).set(not isinstance(outcome, Exception))
        if isinstance(outcome, Exception):
            down[name] = [failures.kind(outcome)]
            reason = f"{type(outcome).__name__}: {getattr(outcome, 'orig', None) or outcome}"
            current_app.logger.error("%s cannot serve: %s", name, *down[name], extra={"reason": reason})
    return down


class ReadinessSchema(Schema):
    redis = fields.String(required=True)
    database = fields.String(required=True)
    wechat = fields.String(required=True)


class VersionSchema(Schema):
    version = fields.String(required=True)
    commit = fields.String(required=True, metadata={"description": "Of git, or a hash of the code; 12 hex digits."})
    built = fields.String(required=True, metadata={"format": "date-time"})
    started = fields.String(required=True, metadata={"format": "date-time"})


@blueprint.route("/livez")
@blueprint.response(200)
def live() -> None:
    """Whether the process responds; no dependency is checked"""


@blueprint.route("/readyz")
@blueprint.response(200, ReadinessSchema)
@blueprint.fails(Code.UNAVAILABLE)
def ready() -> dict[str, str]:
    """Whether Redis and the database take writes; `data.errors` says which does not and why, or that it is stopping

    `wechat` is `down` while this worker pauses calls that kept failing, which is no reason to be unready.
    """
    # Announced by gunicorn.conf.py.
    is_stopping = os.path.exists(f"{os.environ.get(multiprocess.MULTIPROC_DIR)}/stopping")
    down = {"instance": ["Stopping."]} if is_stopping else failing_dependencies()
    if down:
        raise ApiError(Code.UNAVAILABLE, errors=down)
    return {"redis": "up", "database": "up", "wechat": "down" if wechat.api.transport.is_failing else "up"}


@blueprint.route("/version")
@blueprint.response(200, VersionSchema)
def version() -> dict[str, Any]:
    """The version that is running, and since when this process does"""
    return current_app.config["RELEASE"]  # type: ignore[no-any-return]


@scraped.route("/metrics")
@scraped.response(200, {"type": "string"}, content_type="text/plain", description="In Prometheus's text format.")
@scraped.fails(UNAUTHORIZED=METRICS_TOKEN_WRONG, NOT_FOUND=Message("未设置 METRICS_TOKEN", "METRICS_TOKEN is not set"))
def scrape() -> Response:
    """Metrics of all workers together, with Redis and the database checked

    In OpenMetrics where `Accept` prefers it.
    """
    failing_dependencies()
    metrics.publish()
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return current_app.response_class(encode(metrics.SCRAPED), content_type=content_type)
