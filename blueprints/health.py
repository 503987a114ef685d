"""Probes: is the process alive, can it serve, and which version is it."""

from collections.abc import Callable
from typing import Any

from flask import current_app
from marshmallow import Schema, fields
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from blueprints.api import Blueprint
from errors import ApiError, Code
from storage import database, redis

blueprint = Blueprint("health", __name__, description="探针 Probes")


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
    """Redis and the database answer; `data.errors` names what does not"""
    down = {}
    pings: dict[str, Callable[[], object]] = {"redis": redis.ping, "database": database.ping}
    for name, ping in pings.items():
        try:
            ping()
        except (RedisError, SQLAlchemyError) as error:
            current_app.logger.error("%s does not answer: %s", name, type(error).__name__)
            down[name] = ["Does not answer."]
    if down:
        raise ApiError(Code.UNAVAILABLE, errors=down)
    return {"redis": "up", "database": "up"}


@blueprint.route("/version")
@blueprint.response(200, VersionSchema)
def version() -> dict[str, Any]:
    """What is running"""
    return {"version": current_app.config["VERSION"]}
