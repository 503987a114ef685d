from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import event, func, select, update
from sqlalchemy.orm.exc import StaleDataError

from blueprints.orders import STATUS_TRANSITIONS
from storage import database
from storage.models import Order, OrderItem
from tests.blueprints.callers import ITEM, ORDER, Caller, code_of, data_of
from tests.harness import Simulator

ORDERS = "/orders"


def test_an_order_is_made_with_the_totals_that_the_server_computes(alice: Caller) -> None:
    answer = alice.post(ORDERS, ORDER)
    order = data_of(answer, 201)
    assert list(order) == ["id", "user_id", "status", "remark", "total", "items", "created_at", "updated_at"]
    assert (order["user_id"], order["status"], order["remark"], order["total"]) == (alice.id, "pending", "少糖", 3000)
    assert [list(item) for item in order["items"]] == [["id", "sku", "name", "quantity", "unit_price", "subtotal"]] * 2
    assert [item["subtotal"] for item in order["items"]] == [2500, 500]
    assert answer.headers["Location"] == f"/api/v1/orders/{order['id']}"
    assert data_of(alice.get(f"{ORDERS}/{order['id']}")) == order
    assert data_of(alice.post(ORDERS, {"items": [ITEM]}), 201)["remark"] is None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, {"items"}),
        ({"items": []}, {"items"}),
        ({"items": [ITEM] * 101}, {"items"}),
        ({"items": "x"}, {"items"}),
        ({"items": [{**ITEM, "quantity": 0}]}, {"items"}),
        ({"items": [{**ITEM, "quantity": 1.5}]}, {"items"}),
        ({"items": [{**ITEM, "quantity": True}]}, {"items"}),
        ({"items": [{**ITEM, "quantity": 10_000}]}, {"items"}),
        ({"items": [{**ITEM, "unit_price": -1}]}, {"items"}),
        ({"items": [{**ITEM, "unit_price": 10**9 + 1}]}, {"items"}),
        ({"items": [{**ITEM, "name": ""}]}, {"items"}),
        ({"items": [{**ITEM, "sku": "x" * 65}]}, {"items"}),
        ({"items": [{**ITEM, "subtotal": 1}]}, {"items"}),
        ({**ORDER, "total": 1}, {"total"}),
        ({**ORDER, "status": "paid"}, {"status"}),
        ({**ORDER, "user_id": 1}, {"user_id"}),
        ({**ORDER, "remark": "x" * 501}, {"remark"}),
        ({**ORDER, "remark": "x\x00"}, {"remark"}),
    ],
)
def test_an_order_that_cannot_be_is_400_and_the_fields_are_named(alice: Caller, body: Any, named: set[str]) -> None:
    answer = alice.post(ORDERS, body)
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == named
    assert data_of(alice.get(ORDERS))["total"] == 0


def test_a_put_changes_what_it_names_and_leaves_the_rest(alice: Caller) -> None:
    order = alice.order()
    path = f"{ORDERS}/{order['id']}"
    assert data_of(alice.put(path, {"remark": None}))["remark"] is None
    changed = data_of(alice.put(path, {"status": "paid"}))
    assert (changed["status"], changed["total"], changed["items"]) == ("paid", order["total"], order["items"])
    for body in ({"total": 1}, {"items": []}, {"status": "lost"}, {"user_id": 2}):
        assert code_of(alice.put(path, body)) == (400, 400), body


@pytest.mark.parametrize("status", STATUS_TRANSITIONS)
@pytest.mark.parametrize("wanted", STATUS_TRANSITIONS)
def test_a_status_is_followed_by_those_of_the_table_and_no_other(
    alice: Caller, app: Flask, status: str, wanted: str
) -> None:
    path = f"{ORDERS}/{alice.order()['id']}"
    with app.app_context():
        database.session.execute(update(Order).values(status=status))
        database.session.commit()
    answer = alice.put(path, {"status": wanted})
    may = wanted in STATUS_TRANSITIONS[status] or wanted == status
    assert code_of(answer) == ((200, 200) if may else (409, 409))
    assert data_of(alice.get(path))["status"] == (wanted if may else status)


def test_an_order_that_was_paid_is_not_deleted_nor_are_its_items_changed(alice: Caller) -> None:
    order = alice.order()
    path, item = f"{ORDERS}/{order['id']}", f"{ORDERS}/{order['id']}/items/{order['items'][0]['id']}"
    alice.put(path, {"status": "paid"})
    assert code_of(alice.delete(path)) == (409, 409)
    cancelled = alice.order()
    alice.put(f"{ORDERS}/{cancelled['id']}", {"status": "cancelled"})
    assert code_of(alice.delete(f"{ORDERS}/{cancelled['id']}")) == (409, 409)
    assert code_of(alice.post(f"{path}/items", ITEM)) == (409, 409)
    assert code_of(alice.put(item, {"quantity": 5})) == (409, 409)
    assert code_of(alice.delete(item)) == (409, 409)
    assert data_of(alice.get(path))["items"] == order["items"]


def test_an_order_that_is_deleted_is_gone_with_its_items(alice: Caller, app: Flask) -> None:
    order = alice.order()
    path = f"{ORDERS}/{order['id']}"
    assert data_of(alice.delete(path)) == {}
    assert code_of(alice.get(path)) == (404, 404)
    with app.app_context():
        left = select(func.count()).where(OrderItem.order_id == order["id"])
        assert database.session.scalar(left) == 0


def test_items_are_added_changed_and_taken_away_and_the_total_follows(alice: Caller) -> None:
    order = alice.order()
    path = f"{ORDERS}/{order['id']}"
    added = alice.post(f"{path}/items", {**ITEM, "quantity": 1, "unit_price": 1})
    item = data_of(added, 201)
    assert added.headers["Location"] == f"/api/v1{path}/items/{item['id']}"
    assert data_of(alice.get(path))["total"] == 3001
    assert data_of(alice.get(f"{path}/items/{item['id']}")) == item
    changed = data_of(alice.put(f"{path}/items/{item['id']}", {"quantity": 3}))
    assert (changed["quantity"], changed["subtotal"], changed["name"]) == (3, 3, "龙井茶")
    assert data_of(alice.get(path))["total"] == 3003
    assert data_of(alice.delete(f"{path}/items/{item['id']}")) == {}
    assert data_of(alice.get(path))["total"] == 3000
    assert code_of(alice.get(f"{path}/items/{item['id']}")) == (404, 404)
    other = alice.order()
    assert code_of(alice.get(f"{ORDERS}/{other['id']}/items/{order['items'][0]['id']}")) == (404, 404)
    for body in ({"quantity": 0}, {"id": 1}, {"subtotal": 1}, {"unit_price": "1"}):
        answer = alice.put(f"{path}/items/{order['items'][0]['id']}", body)
        assert code_of(answer) == (400, 400), body


def test_items_are_listed_by_pages(alice: Caller) -> None:
    order = alice.order(items=[{**ITEM, "sku": f"sku-{number}"} for number in range(5)])
    listed = data_of(alice.get(f"{ORDERS}/{order['id']}/items?page=2&page_size=2"))
    assert [item["sku"] for item in listed["items"]] == ["sku-2", "sku-3"]
    assert (listed["page"], listed["page_size"], listed["total"]) == (2, 2, 5)


def test_an_order_of_nothing_is_not_paid(alice: Caller) -> None:
    order = alice.order(items=[ITEM])
    path = f"{ORDERS}/{order['id']}"
    assert data_of(alice.delete(f"{path}/items/{order['items'][0]['id']}")) == {}
    assert code_of(alice.put(path, {"status": "paid"})) == (409, 409)


def test_no_more_than_a_hundred_items_are_in_an_order(alice: Caller) -> None:
    order = alice.order(items=[ITEM] * 100)
    assert code_of(alice.post(f"{ORDERS}/{order['id']}/items", ITEM)) == (409, 409)


def test_an_order_is_read_with_its_items_in_one_statement(alice: Caller, app: Flask) -> None:
    path = f"{ORDERS}/{alice.order()['id']}"
    statements: list[str] = []
    listen = app.extensions["database"], "before_cursor_execute", lambda *executed: statements.append(executed[2])
    event.listen(*listen)
    alice.get(path)
    event.remove(*listen)
    read = [statement for statement in statements if "orders" in statement or "order_items" in statement]
    assert len(read) == 1
    assert "order_items" in read[0]


# Lists


def test_one_lists_ones_own_orders_newest_first(alice: Caller, app: Flask, simulator: Simulator) -> None:
    Caller(app, simulator).order()
    ids = [alice.order()["id"] for _ in range(5)]
    listed = data_of(alice.get(f"{ORDERS}?page_size=2"))
    assert [order["id"] for order in listed["items"]] == ids[:2:-1]
    assert (listed["page"], listed["page_size"], listed["total"]) == (1, 2, 5)
    assert [order["id"] for order in data_of(alice.get(f"{ORDERS}?page=3&page_size=2"))["items"]] == ids[:1]
    assert [order["id"] for order in data_of(alice.get(f"{ORDERS}?sort=created_at"))["items"]] == ids
    assert data_of(alice.get(f"{ORDERS}?page=4&page_size=2"))["items"] == []


def test_after_goes_on_where_a_page_ended_whatever_is_added_meanwhile(alice: Caller) -> None:
    ids = [alice.order()["id"] for _ in range(5)]
    seen, after = [], ""
    while items := data_of(alice.get(f"{ORDERS}?page_size=2{after}"))["items"]:
        seen += [order["id"] for order in items]
        after = f"&after={items[-1]['id']}"
        alice.order()
    assert seen == ids[::-1]
    assert [order["id"] for order in data_of(alice.get(f"{ORDERS}?sort=created_at&after={ids[2]}"))["items"]][
        :2
    ] == ids[3:]


def test_orders_are_filtered_by_status_and_by_administrators_also_by_user(alice: Caller, admin: Caller) -> None:
    paid, pending = alice.order(), alice.order()
    alice.put(f"{ORDERS}/{paid['id']}", {"status": "paid"})
    own = admin.order()
    for caller, query, expected in (
        (alice, "?status=paid", [paid["id"]]),
        (alice, f"?user_id={alice.id}", [pending["id"], paid["id"]]),
        (admin, f"?user_id={alice.id}&status=pending", [pending["id"]]),
        (admin, f"?user_id={admin.id}", [own["id"]]),
        (admin, "?page_size=3", [own["id"], pending["id"], paid["id"]]),
    ):
        listed = data_of(caller.get(ORDERS + query))
        assert [order["id"] for order in listed["items"]] == expected, query
    assert paid["id"] in [order["id"] for order in data_of(admin.get(f"{ORDERS}?status=paid"))["items"]]
    assert code_of(alice.get(f"{ORDERS}?user_id={admin.id}")) == (404, 404)


@pytest.mark.parametrize(
    "query",
    ["page=0", "page=x", "page_size=0", "page_size=101", "sort=total", "status=lost", "after=0", f"after={2**63}"]
    + ["user_id=x", "page=1000001", f"user_id={2**63}", "page=5001", "stauts=paid"],
)
def test_a_list_that_cannot_be_is_400(alice: Caller, query: str) -> None:
    answer = alice.get(f"{ORDERS}?{query}")
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == {query.partition("=")[0]}


# ETags


def test_every_read_has_an_etag_and_304_where_it_is_known(alice: Caller) -> None:
    order = alice.order()
    path = f"{ORDERS}/{order['id']}"
    for read in (path, f"{path}/items", f"{path}/items/{order['items'][0]['id']}", ORDERS, "/users/me"):
        etag = alice.etag(read)
        known = alice.get(read, If_None_Match=etag)
        assert (known.status_code, known.data, known.headers["ETag"]) == (304, b"", etag), read
        assert len(known.headers["X-Trace-Id"]) == 32
        assert alice.get(read, If_None_Match='"another"').status_code == 200
    etags = [alice.etag(path)]
    alice.put(path, {"remark": "x"})
    etags.append(alice.etag(path))
    alice.post(f"{path}/items", ITEM)
    etags.append(alice.etag(path))
    alice.put(f"{path}/items/{order['items'][0]['id']}", {"name": "the total stays"})
    etags.append(alice.etag(path))
    assert len(set(etags)) == 4


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_change_needs_the_etag_of_what_is_there_now(alice: Caller, method: str) -> None:
    order = alice.order()
    path = f"{ORDERS}/{order['id']}"
    for resource in (path, f"{path}/items/{order['items'][0]['id']}"):
        body = {} if method == "PUT" else None
        stale = alice.etag(resource)
        alice.put(path, {"remark": stale})
        assert code_of(alice.call(method, resource, body)) == (428, 428)
        for etag in (stale, '"x"', f"W/{alice.etag(resource)}"):
            assert code_of(alice.call(method, resource, body, If_Match=etag)) == (412, 412), etag
    assert data_of(alice.get(path))["items"] == order["items"]


def test_the_answer_to_a_change_has_the_etag_for_the_next_one(alice: Caller) -> None:
    made = alice.post(ORDERS, ORDER)
    path = made.headers["Location"].removeprefix("/api/v1")
    changed = alice.call("PUT", path, {"remark": "1"}, If_Match=made.headers["ETag"])
    again = alice.call("PUT", path, {"remark": "2"}, If_Match=changed.headers["ETag"])
    assert data_of(again)["remark"] == "2"


def test_of_many_writers_at_once_exactly_one_wins(alice: Caller) -> None:
    path = f"{ORDERS}/{alice.order()['id']}"
    etag = alice.etag(path)
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda number: alice.call("PUT", path, {"remark": str(number)}, If_Match=etag), range(64))
        )
    won = [answer for answer in answers if answer.status_code == 200]
    assert len(won) == 1
    assert [code_of(answer) for answer in answers if answer not in won] == [(412, 412)] * 63
    assert data_of(alice.get(path)) == data_of(won[0])


def test_items_added_at_once_are_all_there_and_counted(alice: Caller) -> None:
    path = f"{ORDERS}/{alice.order()['id']}"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: alice.post(f"{path}/items", {**ITEM, "quantity": 1}), range(16)))
    done = [answer for answer in answers if answer.status_code == 201]
    order = data_of(alice.get(path))
    assert len(order["items"]) == 2 + len(done) == 18
    assert order["total"] == 3000 + 1250 * len(done)


# Idempotency keys


def test_a_transaction_that_loses_a_race_for_ever_is_503(
    alice: Caller, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def lose(order: Order) -> None:
        tries.append(order)
        raise StaleDataError

    monkeypatch.setattr(Order, "sum_up", lose)
    assert code_of(alice.post(ORDERS, ORDER)) == (503, 503)
    assert len(tries) == 5
    assert app.extensions["database"].pool.checkedout() == 0
