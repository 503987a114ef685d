"""No user reads or changes the data of another: each method of each route with an id, called with their ids."""

from typing import Any

import pytest
from flask import Flask

from tests.blueprints.callers import Caller, bodies, data_of, ids_of, list_paths, operations
from tests.harness import Simulator

PUBLIC = {"/docs/assets/{filename}"}


def routes_with_ids(app: Flask) -> list[tuple[str, str]]:
    return [(method, path) for method, path in operations(app) if "{" in path and path not in PUBLIC]


def test_each_argument_of_a_route_is_tested(app: Flask, simulator: Simulator) -> None:
    arguments = {name for rule in app.url_map.iter_rules() for name in rule.arguments}
    assert arguments - {"filename"} == ids_of(Caller(app, simulator)).keys(), "add it to ids_of() in callers.py"


@pytest.mark.parametrize("if_match", ["*", '"1"', None])
def test_ids_of_another_user_are_not_found_and_nothing_changes(app: Flask, simulator: Simulator, if_match: Any) -> None:
    victim, prober = Caller(app, simulator), Caller(app, simulator)
    theirs = ids_of(victim)
    mixed = {**theirs, "order_id": prober.order()["id"]}
    missing = dict.fromkeys(theirs, 2**53)
    examples = bodies(simulator, prober.openid)
    headers = {"If_Match": if_match} if if_match else {}
    before = data_of(victim.get("/users/me/export"))
    for method, path in routes_with_ids(app):
        for ids in (theirs, missing, *([mixed] if "item_id" in path else [])):
            body = examples[f"{method} {path}"] if method in ("POST", "PUT") else None
            answer = prober.call(method, path.removeprefix("/api/v1").format(**ids), body, **headers)
            assert answer.status_code == 404, (method, path, answer.text)
            assert method == "HEAD" or answer.get_json()["code"] == 404
    assert data_of(victim.get("/users/me/export")) == before


def test_without_a_session_no_id_is_accepted(app: Flask, simulator: Simulator) -> None:
    ids = ids_of(Caller(app, simulator))
    for method, path in routes_with_ids(app):
        assert app.test_client().open(path.format(**ids), method=method).status_code == 401, (method, path)


def test_a_list_has_nothing_of_another_user(app: Flask, simulator: Simulator) -> None:
    victim, prober = Caller(app, simulator), Caller(app, simulator)
    ids_of(victim), ids_of(prober)
    lists = list_paths(app)
    assert "/orders" in lists
    for path in lists:
        answer = prober.get(path)
        if answer.status_code != 403:  # as those of administrators are
            items = data_of(answer)["items"]
            assert items, f"let ids_of() create something in {path}"
            assert {item["user_id"] for item in items} == {prober.id}, path
            assert prober.get(f"{path}?user_id={victim.id}").status_code in (400, 404), path
