import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import event, select, update
from sqlalchemy.orm.exc import StaleDataError

from blueprints import orders
from blueprints.orders import STATUS_TRANSITIONS, set_status
from dev import openapi
from errors import ApiError, Code
from storage import database
from storage.models import Order, OrderItem
from tests.blueprints.callers import ITEM, ORDER, Caller, code_of, data_of, invalid_fields
from tests.harness import Simulator

ORDERS = "/orders"


def path_of(order: dict[str, Any]) -> str:
    return f"{ORDERS}/{order['id']}"


def ids(user: Caller, query: str = "") -> list[int]:
    return [order["id"] for order in data_of(user.get(ORDERS + query))["items"]]


def test_create_an_order(alice: Caller) -> None:
    answer = alice.post(ORDERS, ORDER)
    order = data_of(answer, 201)
    assert list(order) == ["id", "user_id", "status", "remark", "total", "items", "created_at", "updated_at", "version"]
    assert (order["user_id"], order["status"], order["remark"], order["total"]) == (alice.id, "pending", "少糖", 3000)
    assert [list(item) for item in order["items"]] == [["id", "sku", "name", "quantity", "unit_price", "subtotal"]] * 2
    assert [item["subtotal"] for item in order["items"]] == [2500, 500]
    assert answer.headers["Location"] == f"/api/v1{path_of(order)}"
    assert data_of(alice.get(path_of(order))) == order
    assert data_of(alice.post(ORDERS, {"items": [ITEM]}), 201)["remark"] is None


def test_invalid_orders_and_items_name_the_fields(alice: Caller) -> None:
    invalid_items = [
        {"quantity": 0},
        {"quantity": 1.5},
        {"quantity": True},
        {"quantity": 10_000},
        {"unit_price": -1},
        {"unit_price": 10**9 + 1},
        {"unit_price": "1"},
        {"name": ""},
        {"sku": "x" * 65},
        {"subtotal": 1},
        {"id": 1},
    ]
    invalid = [
        *({"items": items} for items in (None, [], "x", *([{**ITEM, **item}] for item in invalid_items))),
        *({name: value} for name, value in {"total": 1, "status": "paid", "user_id": 1}.items()),
        {"remark": "x" * 501},
        {"remark": "x\x00"},
    ]
    for body in invalid:
        assert invalid_fields(alice.post(ORDERS, {**ORDER, **body})) == set(body), body
    assert invalid_fields(alice.post(ORDERS, {})) == {"items"}
    assert ids(alice) == []
    order = alice.order()
    for body in ({"total": 1}, {"items": []}, {"status": "lost"}, {"user_id": 2}):
        assert invalid_fields(alice.put(path_of(order), body)) == set(body)
    for body in invalid_items:
        assert invalid_fields(alice.post(f"{path_of(order)}/items", {**ITEM, **body})) == set(body)
        assert invalid_fields(alice.put(f"{path_of(order)}/items/{order['items'][0]['id']}", body)) == set(body)
    assert data_of(alice.get(path_of(order))) == order


def test_a_put_keeps_fields_that_it_does_not_name(alice: Caller) -> None:
    order = alice.order()
    assert data_of(alice.put(path_of(order), {"remark": None}))["remark"] is None
    changed = data_of(alice.put(path_of(order), {"status": "cancelled"}))
    assert (changed["status"], changed["total"], changed["items"]) == ("cancelled", order["total"], order["items"])


def test_the_documents_list_the_transitions() -> None:
    listed = "; ".join(f"{old} → {', '.join(new)}" for old, new in STATUS_TRANSITIONS.items() if new)
    text = openapi.notes(orders.OrderChangeSchema)["status"]
    assert text == (f"可变为：{listed.replace('; ', '；')}", f"What may follow: {listed}")


def test_only_the_status_transitions_of_the_table_are_allowed(alice: Caller, admin: Caller, app: Flask) -> None:
    path = path_of(alice.order())
    for old, new in product(STATUS_TRANSITIONS, repeat=2):
        with app.app_context():
            database.session.execute(update(Order).where(Order.user_id == alice.id).values(status=old))
            database.session.commit()
        allowed = new in (old, *STATUS_TRANSITIONS[old])
        expected = (403, 403) if new in ("paid", "shipped") and new != old else (200, 200) if allowed else (409, 409)
        with app.app_context():
            assert code_of(alice.put(path, {"status": new})) == expected, (old, new)
            database.session.execute(update(Order).where(Order.user_id == alice.id).values(status=old))
            database.session.commit()
        assert code_of(admin.put(path, {"status": new})) == ((200, 200) if allowed else (409, 409)), (old, new)
        assert data_of(alice.get(path))["status"] == (new if allowed else old)


def test_a_buyer_learns_who_sets_paid_and_shipped(alice: Caller, app: Flask) -> None:
    path = path_of(alice.order())
    for language, who in (("zh", "管理员或支付回调"), ("en", "an administrator or the payment")):
        answer = alice.call("PUT", path, {"status": "paid"}, If_Match="*", Accept_Language=language)
        assert (code_of(answer), who in answer.get_json()["message"]) == ((403, 403), True)
    assert data_of(alice.get(path))["status"] == "pending"


def test_a_payment_sets_the_status_of_the_order_that_was_paid(alice: Caller, app: Flask) -> None:
    order = alice.order()
    with app.app_context():
        for _ in range(2):  # payments are reported again until the response arrives
            set_status(order["id"], "paid", total=order["total"])
        for arguments, code in (
            ((order["id"], "pending", None), Code.CONFLICT),
            ((order["id"], "shipped", order["total"] - 1), Code.CONFLICT),
            ((2**53, "paid", None), Code.NOT_FOUND),
        ):
            with pytest.raises(ApiError) as refused:
                set_status(arguments[0], arguments[1], total=arguments[2])
            assert refused.value.api_code is code, arguments
    paid = data_of(alice.get(path_of(order)))
    assert (paid["status"], paid["version"]) == ("paid", order["version"] + 1)


def test_a_price_list_decides_wherever_an_item_enters_or_changes(
    alice: Caller, admin: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = {"tea-1": 1200, "cup": 400}
    monkeypatch.setattr(orders, "price_of", lambda item: prices[item["sku"]] - (item["quantity"] >= 10) * 100)
    free = {**ITEM, "unit_price": 0}
    order = alice.order(items=[free, {**free, "sku": "cup"}])
    path = path_of(order)
    assert [item["unit_price"] for item in order["items"]] == [1200, 400]
    item = data_of(alice.post(f"{path}/items", free), 201)
    assert item["unit_price"] == 1200
    for caller, change, price in (
        (alice, {"unit_price": 0}, 1200),
        (alice, {"sku": "cup"}, 400),
        (alice, {"quantity": 10}, 300),
        (admin, {"unit_price": 0}, 300),
    ):
        assert data_of(caller.put(f"{path}/items/{item['id']}", change))["unit_price"] == price, change
    assert data_of(alice.get(path))["total"] == 2 * 1200 + 2 * 400 + 10 * 300


def test_without_a_price_list_a_price_is_the_callers_and_may_be_0(alice: Caller) -> None:
    order = alice.order(items=[{**ITEM, "unit_price": 0}])
    assert (order["items"][0]["unit_price"], order["total"]) == (0, 0)


@pytest.mark.parametrize("status", ["paid", "cancelled"])
def test_only_a_pending_order_can_be_deleted_or_its_items_changed(alice: Caller, admin: Caller, status: str) -> None:
    order = alice.order()
    path, item = path_of(order), f"{path_of(order)}/items/{order['items'][0]['id']}"
    admin.put(path, {"status": status})
    rejected = (
        alice.delete(path),
        alice.post(f"{path}/items", ITEM),
        alice.put(item, {"quantity": 5}),
        alice.delete(item),
        alice.call("DELETE", item),  # a version that fits would not help
    )
    assert [code_of(answer) for answer in rejected] == [(409, 409)] * 5
    # Not that it cannot change at all: its remark and its status can.
    assert {answer.get_json()["message"] for answer in rejected} == {"只有 pending 订单可以删除或更改明细"}
    assert data_of(alice.get(path))["items"] == order["items"]


def test_delete_an_order_with_its_items(alice: Caller, app: Flask) -> None:
    order = alice.order()
    assert data_of(alice.delete(path_of(order))) == {}
    assert code_of(alice.get(path_of(order))) == (404, 404)
    with app.app_context():
        assert database.session.scalars(select(OrderItem).where(OrderItem.order_id == order["id"])).all() == []


def test_add_change_and_remove_items(alice: Caller) -> None:
    order = alice.order()
    path = path_of(order)
    added = alice.post(f"{path}/items", {**ITEM, "quantity": 1, "unit_price": 1})
    item = data_of(added, 201)
    item_path = f"{path}/items/{item['id']}"
    assert added.headers["Location"] == f"/api/v1{item_path}"
    assert data_of(alice.get(item_path)) == item
    assert data_of(alice.get(path))["total"] == 3001
    changed = data_of(alice.put(item_path, {"quantity": 3}))
    assert (changed["quantity"], changed["subtotal"], changed["name"]) == (3, 3, "龙井茶")
    assert data_of(alice.get(path))["total"] == 3003
    assert data_of(alice.delete(item_path)) == {}
    assert data_of(alice.get(path))["total"] == 3000
    assert code_of(alice.get(item_path)) == (404, 404)
    assert code_of(alice.get(f"{path_of(alice.order())}/items/{order['items'][0]['id']}")) == (404, 404)


def test_items_are_listed_by_pages(alice: Caller) -> None:
    order = alice.order(items=[{**ITEM, "sku": f"sku-{number}"} for number in range(5)])
    listed = data_of(alice.get(f"{path_of(order)}/items?page=2&page_size=2"))
    assert [item["sku"] for item in listed["items"]] == ["sku-2", "sku-3"]
    assert (listed["page"], listed["page_size"], listed["total"]) == (2, 2, 5)


def test_the_last_item_cannot_be_deleted(alice: Caller) -> None:
    order = alice.order()
    items = [f"{path_of(order)}/items/{item['id']}" for item in order["items"]]
    assert alice.delete(items[0]).status_code == 200
    for language, hint in (("zh", "删除订单"), ("en", "delete the order")):
        answer = alice.call("DELETE", items[1], If_Match="*", Accept_Language=language)
        assert (code_of(answer), hint in answer.get_json()["message"]) == ((409, 409), True)
    assert len(data_of(alice.get(path_of(order)))["items"]) == 1
    assert alice.delete(path_of(order)).status_code == 200


def test_of_the_last_two_items_deleted_at_once_one_stays(alice: Caller, admin: Caller) -> None:
    for _ in range(10):
        order = alice.order()
        items = [f"{path_of(order)}/items/{item['id']}" for item in order["items"]]
        with ThreadPoolExecutor(4) as pool:
            calls = [(caller, item) for item in items for caller in (alice, admin)]
            answers = list(pool.map(lambda call: call[0].call("DELETE", call[1], If_Match="*"), calls))
        assert sorted(answer.status_code for answer in answers) == [200, 404, 409, 409]
        left = data_of(alice.get(path_of(order)))
        assert [item["subtotal"] for item in left["items"]] == [left["total"]]


def test_an_order_has_at_most_a_hundred_items(alice: Caller) -> None:
    order = alice.order(items=[ITEM] * 100)
    assert code_of(alice.post(f"{path_of(order)}/items", ITEM)) == (409, 409)


def test_an_order_is_read_with_its_items_in_one_statement(alice: Caller, app: Flask) -> None:
    path = path_of(alice.order())
    statements: list[str] = []
    listen = app.extensions["database"], "before_cursor_execute", lambda *executed: statements.append(executed[2])
    event.listen(*listen)
    alice.get(path)
    event.remove(*listen)
    (read,) = [statement for statement in statements if "order" in statement]
    assert "order_items" in read


def test_users_list_their_own_orders_newest_first(alice: Caller, app: Flask, simulator: Simulator) -> None:
    Caller(app, simulator).order()
    created = [alice.order()["id"] for _ in range(5)]
    listed = data_of(alice.get(f"{ORDERS}?page_size=2"))
    assert (listed["page"], listed["page_size"], listed["total"]) == (1, 2, 5)
    assert ids(alice, "?page_size=2") == created[:2:-1]
    assert ids(alice, "?page=3&page_size=2") == created[:1]
    assert ids(alice, "?page=4&page_size=2") == []
    assert ids(alice, "?sort=created_at") == created
    assert ids(alice, f"?sort=created_at&after={created[2]}") == created[3:]


def test_a_list_shows_no_items_and_reads_none(alice: Caller, app: Flask) -> None:
    order = alice.order(items=[ITEM] * 100)
    statements: list[str] = []
    listen = app.extensions["database"], "before_cursor_execute", lambda *executed: statements.append(executed[2])
    event.listen(*listen)
    listed = data_of(alice.get(ORDERS))["items"]
    event.remove(*listen)
    del order["items"]
    assert listed == [order]
    assert [statement for statement in statements if "order_items" in statement] == []


def test_after_continues_a_list_although_orders_are_added(alice: Caller) -> None:
    created = [alice.order()["id"] for _ in range(5)]
    seen: list[int] = []
    while page := ids(alice, f"?page_size=2&after={seen[-1]}" if seen else "?page_size=2"):
        seen += page
        alice.order()
    assert seen == created[::-1]
    assert ids(alice, f"?page_size=2&page=2&after={created[4]}") == created[1::-1]  # pages are counted from there


def test_orders_are_filtered_by_status_and_for_administrators_by_user(alice: Caller, admin: Caller) -> None:
    paid, pending, own = alice.order()["id"], alice.order()["id"], admin.order()["id"]
    admin.put(f"{ORDERS}/{paid}", {"status": "paid"})
    for user, query, expected in (
        (alice, "?status=paid", [paid]),
        (alice, f"?user_id={alice.id}", [pending, paid]),
        (admin, f"?user_id={alice.id}&status=pending", [pending]),
        (admin, f"?user_id={admin.id}", [own]),
        (admin, "?page_size=3", [own, pending, paid]),
    ):
        assert ids(user, query) == expected, query
    assert paid in ids(admin, "?status=paid")
    assert code_of(alice.get(f"{ORDERS}?user_id={admin.id}")) == (404, 404)


def test_the_reasons_of_conflicts_are_in_the_language_of_the_request(alice: Caller, admin: Caller) -> None:
    full, short, paid = alice.order(items=[ITEM] * 100), alice.order(items=[ITEM]), alice.order()
    data_of(admin.put(path_of(paid), {"status": "paid"}))
    item = f"{path_of(paid)}/items/{paid['items'][0]['id']}"
    writes: list[tuple[str, str, Any, str]] = [
        ("POST", f"{path_of(full)}/items", ITEM, "items"),
        ("DELETE", f"{path_of(short)}/items/{short['items'][0]['id']}", None, "items"),
        ("PUT", path_of(paid), {"status": "pending"}, "status"),
        ("DELETE", path_of(paid), None, "status"),
        ("POST", f"{path_of(paid)}/items", ITEM, "status"),
        ("PUT", item, {"quantity": 1}, "status"),
        ("DELETE", item, None, "status"),
        ("POST", "/users", {"openid": alice.openid}, "openid"),
    ]
    for method, path, body, field in writes:
        chinese, english = (
            admin.call(method, path, body, If_Match="*", Accept_Language=language) for language in ("zh-CN", "en-US")
        )
        assert code_of(chinese) == code_of(english) == (409, 409), (method, path)
        for answer, is_chinese in ((chinese, True), (english, False)):
            message = answer.get_json()["message"]
            assert (re.search("[一-鿿]", message) is not None) == is_chinese, message
            assert message not in Code.CONFLICT.message
            assert answer.get_json()["data"] == {"errors": {field: [message]}}


def test_invalid_queries_name_the_parameter(alice: Caller) -> None:
    queries = ["page=0", "page=x", "page=1001", "page_size=0", "page_size=101", "sort=total"]
    queries += ["status=lost", "after=0", f"after={2**63}", "user_id=x", f"user_id={2**63}", "stauts=paid"]
    for query in queries:
        assert invalid_fields(alice.get(f"{ORDERS}?{query}")) == {query.partition("=")[0]}, query


def test_each_change_of_an_order_or_its_items_gives_it_another_etag(alice: Caller) -> None:
    created = alice.post(ORDERS, ORDER)
    path, etag = created.headers["Location"].removeprefix("/api/v1"), created.headers["ETag"]
    item = f"{path}/items/{created.get_json()['data']['items'][0]['id']}"
    etags = [etag]
    for method, changed, body in (
        ("PUT", path, {"remark": "x"}),
        ("POST", f"{path}/items", ITEM),
        ("PUT", item, {"name": "the total stays"}),
        ("PUT", path, {"remark": "y"}),
    ):  # the ETag of a response is that for the next change
        answer = alice.call(method, changed, body, If_Match=etags[-1])
        assert answer.status_code in (200, 201)
        etags.append(answer.headers["ETag"])
    assert len(set(etags)) == 5
    assert alice.etag(path) == alice.etag(item) == etags[-1]


@pytest.mark.usefixtures("patient_writers")
def test_of_many_simultaneous_writers_one_wins(alice: Caller) -> None:
    path = path_of(alice.order())
    etag = alice.etag(path)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: alice.call("PUT", path, {"remark": str(n)}, If_Match=etag), range(64)))
    assert sorted(code_of(answer) for answer in answers) == [(200, 200)] + [(412, 412)] * 63
    assert data_of(alice.get(path)) in [answer.get_json()["data"] for answer in answers]


@pytest.mark.usefixtures("patient_writers")
def test_items_added_simultaneously_are_all_in_the_total(alice: Caller) -> None:
    path = path_of(alice.order())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: alice.post(f"{path}/items", {**ITEM, "quantity": 1}), range(16)))
    assert [answer.status_code for answer in answers] == [201] * 16
    order = data_of(alice.get(path))
    assert (len(order["items"]), order["total"]) == (18, 3000 + 1250 * 16)


def test_a_transaction_that_always_loses_its_race_is_503(
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


@pytest.mark.only_on("mariadb")  # SQLite has one writer at a time
def test_a_buyer_who_writes_all_the_time_does_not_stop_a_shipment(
    app: Flask, alice: Caller, admin: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "in_transaction", partial(database.in_transaction, tries=1))
    order = alice.order()
    with app.app_context(), ThreadPoolExecutor(1) as pool:
        database.session.get_one(Order, order["id"], with_for_update=True).remark = "again"
        database.session.flush()
        paying = pool.submit(admin.call, "PUT", path_of(order), {"status": "paid"}, If_Match="*")
        time.sleep(0.5)
        database.session.commit()
        assert data_of(paying.result())["status"] == "paid"
