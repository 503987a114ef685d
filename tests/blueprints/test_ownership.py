"""No user reads or changes the data of another: each method of each route with an id, called with their ids."""

from typing import Any

import pytest
from flask import Flask

from tests.blueprints.callers import ITEM, Caller, data_of, operations
from tests.harness import Simulator

BODIES = {"/api/v1/orders/{order_id}/items": ITEM}
"""The body of each POST; a PUT takes any part of its fields, and so {}."""

PUBLIC = {"/docs/assets/{filename}"}


def ids_of(victim: Caller) -> dict[str, Any]:
    """For each argument of a route the id of a row that belongs to this user; a new argument has its line here."""
    order = victim.order()
    return {"user_id": victim.id, "order_id": order["id"], "item_id": order["items"][0]["id"]}


def routes_with_ids(app: Flask) -> list[tuple[str, str]]:
    return [(method, path) for method, path in operations(app) if "{" in path and path not in PUBLIC]


def test_each_argument_of_a_route_is_tested(app: Flask, simulator: Simulator) -> None:
    arguments = {name for rule in app.url_map.iter_rules() for name in rule.arguments}
    assert arguments - {"filename"} == ids_of(Caller(app, simulator)).keys(), "add it to ids_of()"


@pytest.mark.parametrize("if_match", ["*", '"1"', None])
def test_ids_of_another_user_are_not_found_and_nothing_changes(app: Flask, simulator: Simulator, if_match: Any) -> None:
    victim, prober = Caller(app, simulator), Caller(app, simulator)
    theirs = ids_of(victim)
    mixed = {**theirs, "order_id": prober.order()["id"]}
    missing = dict.fromkeys(theirs, 2**53)
    headers = {"If_Match": if_match} if if_match else {}
    before = data_of(victim.get("/users/me/export"))
    for method, path in routes_with_ids(app):
        for ids in (theirs, missing, *([mixed] if "item_id" in path else [])):
            body = BODIES.get(path, {}) if method in ("POST", "PUT") else None
            answer = prober.call(method, path.removeprefix("/api/v1").format(**ids), body, **headers)
            assert answer.status_code == 404, (method, path, answer.text)
            assert method == "HEAD" or answer.get_json()["code"] == 404
    assert data_of(victim.get("/users/me/export")) == before


def test_without_a_session_no_id_is_accepted(app: Flask, simulator: Simulator) -> None:
    ids = ids_of(Caller(app, simulator))
    for method, path in routes_with_ids(app):
        assert app.test_client().open(path.format(**ids), method=method).status_code == 401, (method, path)
