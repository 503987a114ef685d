"""Nobody reads or changes what is not theirs: each method of each route with an id, tried with somebody else's ids."""

import re
from typing import Any

import pytest
from flask import Flask

from tests.blueprints.callers import ITEM, Caller
from tests.harness import Simulator

BODIES = {"/api/v1/orders/{order_id}/items": ITEM}
"""What a POST wants; a PUT takes any part of it, and so {}."""


def operations(app: Flask) -> list[tuple[str, str]]:
    """Every method and path with an id."""
    return [
        (method, re.sub(r"<\w+:(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"OPTIONS"})
        if {"user_id", "order_id", "item_id"} & rule.arguments
    ]


@pytest.mark.parametrize("if_match", ["*", '"1"', None])
def test_somebody_elses_ids_lead_nowhere_and_change_nothing(app: Flask, simulator: Simulator, if_match: Any) -> None:
    victim, prober = Caller(app, simulator), Caller(app, simulator)
    order, own = victim.order(), prober.order()
    theirs = {"user_id": victim.id, "order_id": order["id"], "item_id": order["items"][0]["id"]}
    mixed = {**theirs, "order_id": own["id"]}
    nobodys = dict.fromkeys(theirs, 2**53)
    headers = {"If_Match": if_match} if if_match else {}
    before = held(victim)
    assert len(operations(app)) >= 20
    for method, path in operations(app):
        for ids in (theirs, nobodys, *([mixed] if "item_id" in path else [])):
            body = BODIES.get(path, {}) if method in ("POST", "PUT") else None
            answer = prober.call(method, path.removeprefix("/api/v1").format(**ids), body, **headers)
            assert answer.status_code == 404, (method, path, answer.text)
            assert method == "HEAD" or answer.get_json()["code"] == 404
    assert held(victim) == before


def test_without_a_session_no_id_leads_anywhere(app: Flask, simulator: Simulator) -> None:
    victim = Caller(app, simulator)
    order = victim.order()
    ids = {"user_id": victim.id, "order_id": order["id"], "item_id": order["items"][0]["id"]}
    for method, path in operations(app):
        assert app.test_client().open(path.format(**ids), method=method).status_code == 401, (method, path)


def held(victim: Caller) -> list[Any]:
    return [victim.get(path).get_json()["data"] for path in ("/users/me", "/orders", "/users/me/export")]
