"""`flask switch`: routes that an operator has switched off, on all instances, until they are switched on again.

Redis keeps them. Each worker reads them once a second, beside its requests; while Redis is away nothing changes.
"""

import fnmatch
import time

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from flask_smorest.spec.plugins import FlaskPlugin

from telemetry import metrics

KEY, WAIT_SECONDS = "switched_off", 2
"""The hash in Redis; and how long `flask switch` waits, until each worker has read it again."""


class Switches:
    """The routes that can be switched off, not probes and metrics; and the endpoints of those that are off."""

    def __init__(self, app: Flask) -> None:
        self.redis, self.off = app.extensions["quiet_redis"], set[str]()
        rules = [rule for rule in app.url_map.iter_rules() if rule.rule.startswith("/api/")]
        name = FlaskPlugin.flaskpath2openapi
        self.routes = {name(f"{verb} {rule}"): rule for rule in rules for verb in rule.methods - {"HEAD", "OPTIONS"}}  # type: ignore[operator]

    def read(self) -> dict[str, str]:
        """Read what is off, and refuse it from now on.

        :returns: since when, by whom and why, by the name of the route, which may be one of another version of ours.
        :raises redis.exceptions.RedisError: if Redis is away. Then nothing changes.
        """
        found = {name.decode(): facts.decode() for name, facts in self.redis.hgetall(KEY).items() if facts}
        self.off = {rule.endpoint for name, rule in self.routes.items() if name in found}
        for name, rule in self.routes.items():
            metrics.SWITCHED_OFF.labels(name.split()[0], rule.rule).set(rule.endpoint in self.off)
        return found


@click.command()
@click.argument("action", type=click.Choice(["off", "on", "list"]))
@click.argument("route", default="")
@click.option("--reason", default="no reason given", help="For the list and the log.")
@click.option("--by", envvar=["SUDO_USER", "USER"], default="somebody", help="Who does it; by default you.")
@with_appcontext
def switch(action: str, route: str, reason: str, by: str) -> None:
    """Switch routes off, so that they respond with 503, or on again; or list those that are off.

    ROUTE is as in openapi.json, such as "POST /api/v1/orders"; * stands for anything: "* /api/v1/orders*".
    """
    switches: Switches = current_app.extensions["switches"]
    routes, off = switches.routes, switches.read()
    if action == "list":
        click.echo("\n".join(f"{name}: off since {off[name]}" for name in sorted(off)) or "Nothing is switched off.")
        return
    if not (names := fnmatch.filter({*routes, *off}, route)):
        raise click.ClickException("\n  ".join(["Under /api there is no such route, but:", *sorted(routes)]))
    facts = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} by {by}: {reason}" if action == "off" else ""
    for name in names:
        switches.redis.hset(KEY, name, facts)  # empty: it is on again
        current_app.logger.info("audit", extra={"event": f"route {action}", "route": name, "by": by, "reason": reason})
    time.sleep(WAIT_SECONDS)
