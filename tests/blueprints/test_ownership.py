"""Nobody reads or changes what is not theirs: each method of each route with an id, tried with somebody else's ids."""

from typing import Any

import pytest
from flask import Flask

from tests.blueprints.callers import ITEM, Caller, operations
from tests.harness import Simulator

BODIES = {"/api/v1/orders/{order_id}/items": ITEM}
"""What a POST takes; a PUT takes any part of it, and so {}."""

PUBLIC = {"/docs/assets/{filename}"}


def ids_of(victim: Caller) -> dict[str, Any]:
    """For each argument of a route the id of something that belongs to this user; a new argument has its line here."""
    order = victim.order()
    return {"user_id": victim.id, "order_id": order["id"], "item_id": order["items"][0]["id"]}


def routes_with_ids(app: Flask) -> list[tuple[str, str]]:
    return [(method, path) for method, path in operations(app) if "{" in path and path not in PUBLIC]


def test_each_argument_of_a_route_is_tried(app: Flask, simulator: Simulator) -> None:
    arguments = {name for rule in app.url_map.iter_rules() for name in rule.arguments}
    assert arguments - {"filename"} == ids_of(Caller(app, simulator)).keys(), "say in ids_of() what it names"


@pytest.mark.parametrize("if_match", ["*", '"1"', None])
def test_ids_of_another_user_are_not_found_and_nothing_changes(app: Flask, simulator: Simulator, if_match: Any) -> None:
    victim, prober = Caller(app, simulator), Caller(app, simulator)
    theirs = ids_of(victim)
    mixed = {**theirs, "order_id": prober.order()["id"]}
    nobodys = dict.fromkeys(theirs, 2**53)
    headers = {"If_Match": if_match} if if_match else {}
    before = held(victim)
    for method, path in routes_with_ids(app):
        for ids in (theirs, nobodys, *([mixed] if "item_id" in path else [])):
            body = BODIES.get(path, {}) if method in ("POST", "PUT") else None
            answer = prober.call(method, path.removeprefix("/api/v1").format(**ids), body, **headers)
            assert answer.status_code == 404, (method, path, answer.text)
            assert method == "HEAD" or answer.get_json()["code"] == 404
    assert held(victim) == before


def test_without_a_session_no_id_is_accepted(app: Flask, simulator: Simulator) -> None:
    ids = ids_of(Caller(app, simulator))
    for method, path in routes_with_ids(app):
        assert app.test_client().open(path.format(**ids), method=method).status_code == 401, (method, path)


def held(victim: Caller) -> list[Any]:
    return [victim.get(path).get_json()["data"] for path in ("/users/me", "/orders", "/users/me/export")]
