"""The metrics that Prometheus scrapes."""

from flask import Response, current_app, request
from prometheus_client.exposition import choose_encoder

from blueprints.api import Blueprint
from blueprints.health import failing_dependencies
from blueprints.policies import METRICS_TOKEN_WRONG
from errors import Code, Message
from telemetry.metrics import SCRAPED, publish

blueprint = Blueprint("metrics", __name__, description="指标 Metrics")


@blueprint.route("/metrics")
@blueprint.response(200, {"type": "string"}, content_type="text/plain", description="In Prometheus's text format.")
@blueprint.fails(Code.UNAUTHORIZED, message=METRICS_TOKEN_WRONG)
@blueprint.fails(Code.NOT_FOUND, message=Message("未设置 METRICS_TOKEN", "METRICS_TOKEN is not set"))
def scrape() -> Response:
    """Metrics of all workers together, with Redis and the database checked

    In OpenMetrics where `Accept` prefers it.
    """
    failing_dependencies()
    publish()
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return current_app.response_class(encode(SCRAPED), content_type=content_type)
