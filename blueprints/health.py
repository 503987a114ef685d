"""Probes: is the process alive, can it serve, which version does it run; and the metrics that Prometheus scrapes."""

import os
from typing import Any

from flask import Response, current_app, request
from marshmallow import Schema, fields
from prometheus_client.exposition import choose_encoder

import wechat
from blueprints.api import TIME, Blueprint
from blueprints.policies import METRICS_TOKEN_WRONG
from concurrency import in_parallel
from errors import ApiError, Code, Message
from storage import database, failures, redis_client
from telemetry import metrics, multiprocess

CHECK_SECONDS = 0.7
"""How long Redis and the database may take; with everything around it, a probe takes less than a second."""

blueprint = Blueprint("health", __name__, title=Message("探针", "Probes"))
scraped = Blueprint("metrics", __name__, title=Message("指标", "Metrics"))

METRICS_SCHEMA = {"type": "string", "examples": ['kuaishang_dependency_up{dependency="redis"} 1.0']}


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
    redis = fields.String(required=True, metadata={"enum": ["up"], "example": "up"})
    database = fields.String(required=True, metadata={"enum": ["up"], "example": "up"})
    wechat = fields.String(required=True, metadata={"enum": ["up", "down"], "example": "up"})


class VersionSchema(Schema):
    version = fields.String(required=True, metadata={"example": "1.0.0"})
    commit = fields.String(required=True, metadata={"example": "1c556002af70"})
    """git 的提交，或代码的哈希；12 位十六进制 | Of git, or a hash of the code; 12 hex digits"""
    built = fields.String(required=True, metadata={"format": "date-time", **TIME})
    started = fields.String(required=True, metadata={"format": "date-time", **TIME})


@blueprint.route("/livez")
@blueprint.response(200)
def check_liveness() -> None:
    """进程是否响应 | Whether the process responds

    不检查任何依赖。

    No dependency is checked.
    """


@blueprint.route("/readyz")
@blueprint.response(200, ReadinessSchema)
@blueprint.fails(Code.UNAVAILABLE)
def check_readiness() -> dict[str, str]:
    """能否服务：Redis 和数据库可写 | Whether it can serve: Redis and the database take writes

    `data.errors` 说明哪一个不可写及原因，或实例正在停止。
    `wechat` 为 `down` 表示该进程暂停了一再失败的微信调用，仍可服务。

    `data.errors` says which does not and why, or that the instance is stopping. `wechat` is `down` while this worker
    pauses calls that kept failing, which is no reason to be unready.
    """
    # Announced by gunicorn.conf.py.
    is_stopping = os.path.exists(f"{os.environ.get(multiprocess.MULTIPROC_DIR)}/stopping")
    down = {"instance": ["Stopping."]} if is_stopping else failing_dependencies()
    if down:
        raise ApiError(Code.UNAVAILABLE, errors=down)
    return {"redis": "up", "database": "up", "wechat": "down" if wechat.api.transport.is_failing else "up"}


@blueprint.route("/version")
@blueprint.response(200, VersionSchema)
def get_version() -> dict[str, Any]:
    """运行中的版本和启动时间 | The running version, and when this process started

    每个实例、每个进程各自回答。

    Each process of each instance answers for itself.
    """
    return current_app.config["RELEASE"]  # type: ignore[no-any-return]


@scraped.route("/metrics")
@scraped.response(200, METRICS_SCHEMA, content_type="text/plain")
@scraped.fails(UNAUTHORIZED=METRICS_TOKEN_WRONG, NOT_FOUND=Message("未设置 METRICS_TOKEN", "METRICS_TOKEN is not set"))
def get_metrics() -> Response:
    """所有进程的指标 | Metrics of all workers

    Prometheus 文本格式，`Accept` 要求时为 OpenMetrics。Redis 和数据库会被检查一次。

    Redis and the database are checked first. In Prometheus's text format, or in OpenMetrics where `Accept` prefers it.
    """
    failing_dependencies()
    metrics.publish()
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return current_app.response_class(encode(metrics.SCRAPED), content_type=content_type)
