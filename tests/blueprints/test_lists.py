"""Every list is served by an index, however it is filtered, sorted and paged."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import pytest
from flask import Flask
from sqlalchemy import Connection, event, insert, text

from blueprints.orders import STATUS_TRANSITIONS
from storage import database
from storage.models import Order, User, now
from tests.blueprints.callers import API, Caller, data_of, list_paths
from tests.harness import Simulator


class Listed(NamedTuple):
    """What a list shows."""

    model: Any
    row: dict[str, Any]
    """A row, without its user."""
    filters: dict[str, str]
    """Each filter with a value."""


LISTS = {
    "/orders": Listed(Order, {"total": 0}, {"status": "paid", "user_id": "{id}"}),
    "/users": Listed(User, {}, {}),
}
OF_A_USER = {path: listed for path, listed in LISTS.items() if listed.model is not User}
ROWS = 3000


@pytest.fixture
def admin(app: Flask, simulator: Simulator) -> Caller:
    """An administrator of a shop with many orders, and whatever else is listed, of many users."""
    admin = Caller(app, simulator, role="admin")
    with app.app_context():
        moment = now()
        buyers = [f"o-buyer-{admin.id}-{number}" for number in range(30)]
        rows = [{"app_id": "wx", "openid": name, "created_at": moment, "updated_at": moment} for name in buyers]
        database.session.execute(insert(User), rows)
        ids = database.session.scalars(text("SELECT id FROM users ORDER BY id DESC LIMIT 30")).all()
        for listed in OF_A_USER.values():
            database.session.execute(insert(listed.model), rows_of(listed, ids, ROWS))
        database.session.commit()
        analyze()
    return admin


def rows_of(listed: Listed, users: list[int], count: int) -> list[dict[str, Any]]:
    """Rows of these users in turn; those with a status, of each status in turn."""
    statuses = list(STATUS_TRANSITIONS) if "status" in listed.filters else []
    return [
        {"user_id": users[n % len(users)], **listed.row, **({"status": statuses[n % 5]} if statuses else {})}
        for n in range(count)
    ]


def analyze() -> None:
    """Let the database count its rows, before it chooses an index."""
    if database.session.get_bind().dialect.name == "mysql":
        database.session.execute(text(f"ANALYZE TABLE {', '.join(TABLES)}"))
        database.session.commit()


@contextmanager
def plans(app: Flask, begins: str = "SELECT") -> Iterator[list[tuple[str, str]]]:
    """The statements that begin so, without those about order items, each with the query plan of the database."""
    engine, found = app.extensions["database"], []

    def explain(connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(begins) and "order_items" not in statement:
            cursor = connection.connection.cursor()
            cursor.execute(f"{EXPLAIN[engine.dialect.name]} {statement}", parameters)
            plan = "\n".join(map(str, cursor.fetchall()))
            found.append((statement, re.sub(r'"<derived\d+>",\\n *"access_type": "ALL"', "", plan)))  # what was found
            cursor.close()

    event.listen(engine, "before_cursor_execute", explain)
    yield found
    event.remove(engine, "before_cursor_execute", explain)


EXPLAIN = {"sqlite": "EXPLAIN QUERY PLAN", "mysql": "EXPLAIN FORMAT=JSON"}
TABLES = [listed.model.__tablename__ for listed in LISTS.values()]
# Without a condition the table itself is read in the order of its ids, no further than the limit.
BAD = {
    "sqlite": ["TEMP B-TREE", *(f"SCAN {table}'" for table in TABLES)],
    "mysql": ["filesort", '"access_type": "ALL"', "temporary"],
}


def test_every_list_and_filter_is_tested(app: Flask) -> None:
    assert set(list_paths(app)) == LISTS.keys(), "add it to LISTS"
    document = app.test_client().get("/openapi.json").get_json()
    for path, listed in LISTS.items():
        parameters = document["paths"][API + path]["get"]["parameters"]
        names = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
        assert names - {"page", "page_size", "after", "sort"} == listed.filters.keys(), path


def assert_served_by_an_index(app: Flask, explained: list[tuple[str, str]], request: object) -> None:
    assert len(explained) >= 3
    for statement, plan in explained:
        signs = BAD[app.extensions["database"].dialect.name]
        bad = [sign for sign in signs if sign in plan and ("WHERE" in statement or "SCAN" not in sign)]
        assert not bad, f"{request}\n{statement}\n{plan}"


@pytest.mark.parametrize("path", LISTS)
def test_every_list_is_served_by_an_index(app: Flask, admin: Caller, simulator: Simulator, path: str) -> None:
    user = Caller(app, simulator)
    with app.app_context():  # enough for the database to see that an index is worth it
        callers = [user.id, admin.id]
        for listed in OF_A_USER.values():
            database.session.execute(insert(listed.model), rows_of(listed, callers, 1200))
        database.session.commit()
        analyze()
    filters = LISTS[path].filters
    for chosen, sort, place in product(
        product([True, False], repeat=len(filters)), ["created_at", "-created_at"], ["page=1", "page=7", "after=50"]
    ):
        for caller in (admin, *([user] if path in OF_A_USER else [])):
            wanted = [f"{name}={value}" for (name, value), use in zip(filters.items(), chosen, strict=True) if use]
            query = "&".join([*wanted, f"sort={sort}", place]).format(id=caller.id)
            with plans(app) as explained:
                data_of(caller.get(f"{path}?{query}"))
            assert_served_by_an_index(app, explained, query)


def test_a_search_by_phone_is_served_by_an_index(app: Flask, admin: Caller) -> None:
    for sort, place in product(["created_at", "-created_at"], [{"page": 1}, {"page": 7}, {"after": 50}]):
        body = {"phone": "13812345678", "sort": sort, **place}
        with plans(app) as explained:
            data_of(admin.post("/users/search", body))
        assert_served_by_an_index(app, explained, body)


def test_a_list_is_counted_up_to_the_limit(admin: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blueprints.lists.COUNT_LIMIT", 100)
    assert data_of(admin.get("/orders"))["total"] == 100
    assert data_of(admin.get("/orders?status=paid"))["total"] == 100
    assert data_of(admin.get("/users?page_size=1"))["total"] <= 100
    assert data_of(admin.get(f"/orders?user_id={admin.id}"))["total"] == 0
