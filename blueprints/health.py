"""Probes: is the process alive, can it serve, and which version is it."""

from typing import Any

from flask import current_app, g
from marshmallow import Schema, fields
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from blueprints.api import Blueprint
from concurrency import fan_out
from errors import ApiError, Code
from storage import database, redis
from telemetry import instance_directory, metrics

CHECK_SECONDS = 0.7
"""How long Redis and the database may take to answer; with all that is around it, less than a second."""

blueprint = Blueprint("health", __name__, description="探针 Probes")


def find_down() -> dict[str, list[str]]:
    """Ask Redis and the database, both at once, and note in the metrics who is up. Takes CHECK_SECONDS at the most.

    :returns: what is wrong, by the name of what is down; empty if nothing is.
    :raises Exception: what a check raised that is no outage but a mistake of ours.
    """
    down = {}
    for name, outcome in fan_out.run({"redis": redis.ping, "database": database.ping}, CHECK_SECONDS).items():
        failed = isinstance(outcome, Exception)
        metrics.DEPENDENCY_UP.labels(name).set(not failed)
        if not failed:
            continue
        if not isinstance(outcome, RedisError | SQLAlchemyError | TimeoutError):
            raise outcome
        wrong = "Is not migrated." if database.lacks_tables(outcome) else "Does not answer."
        current_app.logger.error(
            "%s cannot serve: %s",
            name,
            wrong,
            extra={"reason": f"{type(outcome).__name__}: {getattr(outcome, 'orig', None) or outcome}"},
        )
        down[name] = [wrong]
    return down


class ReadinessSchema(Schema):
    redis = fields.String(required=True)
    database = fields.String(required=True)


class VersionSchema(Schema):
    version = fields.String(required=True)


@blueprint.route("/livez")
@blueprint.response(200)
def live() -> None:
    """The process answers; nothing behind it is asked"""


@blueprint.route("/readyz")
@blueprint.response(200, ReadinessSchema)
@blueprint.fails(Code.UNAVAILABLE)
def ready() -> dict[str, str]:
    """Redis and the database answer; `data.errors` names what does not, or says that a stop has begun"""
    g.stopping = instance_directory.is_stopping()  # that is no fault, so its line is no error
    down = {"instance": ["Is stopping."]} if g.stopping else find_down()
    if down:
        raise ApiError(Code.UNAVAILABLE, errors=down)
    return {"redis": "up", "database": "up"}


@blueprint.route("/version")
@blueprint.response(200, VersionSchema)
def version() -> dict[str, Any]:
    """What is running"""
    return {"version": current_app.config["VERSION"]}
