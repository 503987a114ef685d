"""`flask switch`: routes that an operator has switched off, on all instances, until they are switched on again.

Redis keeps the last change of each. Each worker reads them once a second, beside its requests, and logs what it
applies; while Redis is away nothing changes.
"""

import fnmatch
import json
import time

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from redis.exceptions import RedisError

from blueprints.parsing import openapi_path
from storage.failures import kind
from telemetry import metrics

KEY, WAIT_SECONDS = "switches", 2
"""The hash in Redis; and how long `flask switch` waits, until each worker has read it again."""


class Switches:
    """The routes that can be switched off, not probes and metrics; and the endpoints of those that are off."""

    def __init__(self, app: Flask) -> None:
        self.redis, self.off, self._logger = app.extensions["quiet_redis"], set[str](), app.logger
        self._found: dict[str, dict[str, str]] = {}
        rules = [rule for rule in app.url_map.iter_rules() if rule.rule.startswith("/api/")]
        each = [(verb, rule) for rule in rules for verb in (rule.methods or set()) - {"HEAD", "OPTIONS"}]
        self.routes = {f"{verb} {openapi_path(rule)}": rule for verb, rule in each}

    def read(self, quiet: bool = False) -> dict[str, dict[str, str]]:
        """Read what is off, and refuse it from now on. Unless `quiet`, log what is not as it was at the last call.

        :returns: since when, by whom and why, by the name of the route, which may be one of another version of ours.
        :raises redis.exceptions.RedisError: if Redis is away. Then nothing changes.
        """
        changes = {name.decode(): json.loads(change) for name, change in self.redis.hgetall(KEY).items()}
        before, found = self._found, {name: one for name, one in changes.items() if one["event"] == "route off"}
        self._found, self.off = found, {rule.endpoint for name, rule in self.routes.items() if name in found}
        for name, rule in self.routes.items():
            metrics.SWITCHED_OFF.labels(name.split()[0], rule.rule).set(rule.endpoint in self.off)
        for name in sorted(name for name in before | found if before.get(name) != found.get(name) and not quiet):
            self._logger.info("audit", extra={"route": name, **changes.get(name, {"event": "route on"})})
        return found


@click.command()
@click.argument("action", type=click.Choice(["off", "on", "list"]))
@click.argument("route", default="")
@click.option("--reason", default="no reason given", help="For the list and the log.")
@click.option("--by", envvar=["SUDO_USER", "USER"], default="unknown", help="Operator name.")
@with_appcontext
def switch(action: str, route: str, reason: str, by: str) -> None:
    """Switch routes off, so that they respond with 503, or on again; or list those that are off.

    ROUTE is as in openapi.json, such as "POST /api/v1/orders"; * stands for anything: "* /api/v1/orders*".
    """
    switches: Switches = current_app.extensions["switches"]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        off = switches.read(quiet=True)
        if action == "list":
            lines = ["{}: off since {since} by {by}: {reason}".format(name, **off[name]) for name in sorted(off)]
            click.echo("\n".join(lines) or "Nothing is switched off.")
            return
        if not (names := fnmatch.filter({*switches.routes, *off}, route)):
            raise click.ClickException("\n  ".join(["No such route. Known routes:", *sorted(switches.routes)]))
        endpoints = {switches.routes[name].endpoint for name in names if name in switches.routes}
        names += [name for name, rule in switches.routes.items() if rule.endpoint in endpoints]  # at all addresses
        change = json.dumps({"event": f"route {action}", "since": now, "by": by, "reason": reason})
        switches.redis.hset(KEY, mapping=dict.fromkeys(names, change))
        switches.read()
    except RedisError as error:
        raise click.ClickException(f"Redis is unavailable: {kind(error)}") from None
    time.sleep(WAIT_SECONDS)
