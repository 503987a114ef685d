from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import permutations

import pytest
from flask import Flask, Request
from marshmallow import Schema, fields
from sqlalchemy import insert, select, text, update
from werkzeug.test import TestResponse

from blueprints.api import Blueprint, register
from blueprints.parsing import read_body
from blueprints.policies import signed_in
from errors import Message
from storage import database
from storage.models import IdempotencyKey, Order, now
from tests.blueprints.callers import ITEM, ORDER, Caller, code_of, data_of, invalid_fields
from tests.blueprints.test_lists import plans
from tests.harness import Simulator


def stored_keys(app: Flask, user: Caller) -> dict[str, int | None]:
    """The idempotency keys of a user, each with the id of the user whom its response is about."""
    with app.app_context():
        keys = database.session.scalars(select(IdempotencyKey).where(IdempotencyKey.user_id == user.id))
        return {key.key: key.about_user_id for key in keys}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/orders", ORDER), ("/orders/{}/items", ITEM), ("/users", {"openid": "o-once", "nickname": "阿一"})],
)
def test_a_repeat_on_another_instance_gets_the_first_response_byte_for_byte(
    admin: Caller, make_app: Callable[..., Flask], path: str, body: object
) -> None:
    order = admin.order()
    path = path.format(order["id"])
    first = admin.post(path, body, Idempotency_Key="tap")
    created = first.headers["Location"].removeprefix("/api/v1")
    admin.put(created, {"nickname": "阿二"} if path == "/users" else {"quantity": 9} if "items" in path else {})
    admin.client = make_app().test_client(use_cookies=False)
    again = admin.post(path, body, Idempotency_Key="tap")
    assert (first.status_code, again.status_code, again.data) == (201, 201, first.data)
    for header in ("ETag", "Location", "Content-Type", "Vary", "Cache-Control"):
        assert again.headers[header] == first.headers[header]
    orders = data_of(admin.get(f"/orders?user_id={admin.id}"))["items"]
    assert len(orders) == (2 if path == "/orders" else 1)
    assert len(data_of(admin.get(f"/orders/{order['id']}"))["items"]) == (3 if "items" in path else 2)


def test_another_request_under_the_same_key_gets_465(alice: Caller) -> None:
    order, other = alice.order(), alice.order()
    path = f"/orders/{order['id']}/items"
    assert alice.post(path, ITEM, Idempotency_Key="tap").status_code == 201
    for different, body in (
        (path, {**ITEM, "quantity": 1}),
        (f"/orders/{other['id']}/items", ITEM),
        ("/orders", ORDER),
    ):
        assert code_of(alice.post(different, body, Idempotency_Key="tap")) == (409, 465), different
    assert data_of(alice.get("/orders"))["total"] == 2


def send(user: Caller, body: str | bytes, path: str = "/orders", **headers: str) -> TestResponse:
    """Create an order from this very text, under one key."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {**user.headers, "Content-Type": "application/json", "Idempotency-Key": "tap", **given}
    return user.client.post(f"/api/v1{path}", data=body, headers=headers)


ONE = '{"remark": "茶", "items": [{"sku": "s", "name": "n", "quantity": 1, "unit_price": 5}]}'


@pytest.mark.parametrize(
    ("body", "path", "same"),
    [
        ('{"items":[{"unit_price":5,"quantity":1,"name":"n","sku":"s"}],"remark":"茶"}', "/orders", True),
        (f" \n{ONE}\t".replace("茶", "\\u8336").replace('"n"', '"\\u006e"'), "/orders", True),
        (ONE, "/orders?", True),
        (ONE.replace("茶", "咖啡"), "/orders", False),
        (ONE.replace('"remark": "茶", ', ""), "/orders", False),
        (ONE.replace('"茶"', "null"), "/orders", False),
        (ONE.replace("}]", '}, {"sku": "s", "name": "n", "quantity": 1, "unit_price": 5}]'), "/orders", False),
        (ONE, "/orders?a=1", False),
    ],
)
def test_what_counts_as_the_same_request_is_the_parsed_body(alice: Caller, body: str, path: str, same: bool) -> None:
    first, again = send(alice, ONE), send(alice, body, path)
    assert first.status_code == 201
    assert (again.data == first.data) == same
    assert code_of(again) == ((201, 200) if same else (409, 465))
    assert data_of(alice.get("/orders"))["total"] == 1


@pytest.fixture
def of_any_value(make_app: Callable[..., Flask], simulator: Simulator) -> Caller:
    """A user of a POST that takes any JSON value, and reads its body only under its key."""
    group = Blueprint("group", __name__, title=Message("", ""))
    schema = Schema.from_dict({"value": fields.Raw(allow_none=True)})
    view = group.response(200, schema)(group.arguments(schema)(lambda body: body))
    group.route("", methods=["POST"], endpoint="view")(view)
    app = make_app()
    register(app, group, url_prefix="/api/v1/group", auth=signed_in)
    return Caller(app, simulator)


def test_values_of_another_type_are_another_request(of_any_value: Caller) -> None:
    values = ["1", "1.0", "true", '"1"', "null", "[1]"]
    for first, other in permutations(values, 2):
        key = f"{first}/{other}".replace(" ", "")
        assert send(of_any_value, f'{{"value": {first}}}', "/group", Idempotency_Key=key).status_code == 200
        assert code_of(send(of_any_value, f'{{"value": {other}}}', "/group", Idempotency_Key=key)) == (409, 465), key
        assert send(of_any_value, f'{{"value":{first}}}', "/group", Idempotency_Key=key).status_code == 200
    for body, status in (("{", 400), ("[" * 8000, 400), ("1" * 5000, 400), ('{"value": 1.0}', 200)):
        assert send(of_any_value, body, "/group").status_code == status


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 50_000,
        b"9" * 5000,
        ONE.replace("5}", '5, "sku": ""}').encode(),
        b'{"remark": "\\ud800"}',
        b"NaN",
    ],
)
def test_a_malformed_body_under_a_key_is_400(alice: Caller, body: bytes) -> None:
    assert send(alice, body).status_code == 400
    assert send(alice, ONE).status_code == 201


@pytest.mark.parametrize("depth", [*range(20, 1000, 49), *range(900, 1000, 7)])
def test_a_deeply_nested_body_under_a_key_is_400(alice: Caller, depth: int) -> None:
    assert send(alice, b'{"items": ' + b"[" * depth + b"]" * depth + b"}").status_code == 400


def test_a_key_belongs_to_one_user(alice: Caller, app: Flask, simulator: Simulator) -> None:
    answers = [user.post("/orders", ORDER, Idempotency_Key="tap") for user in (alice, Caller(app, simulator))]
    assert data_of(answers[0], 201)["id"] != data_of(answers[1], 201)["id"]


@pytest.mark.usefixtures("patient_writers")
def test_simultaneous_requests_under_one_key_create_one_order(alice: Caller) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: alice.post("/orders", ORDER, Idempotency_Key="tap"), range(100)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.data for answer in answers}) == 1
    assert data_of(alice.get("/orders"))["total"] == 1


def test_a_failure_does_not_use_up_the_key(alice: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(alice.post("/orders", {"items": []}, Idempotency_Key="tap")) == (400, 400)
    monkeypatch.setattr(Order, "sum_up", lambda order: 1 / 0)
    assert alice.post("/orders", ORDER, Idempotency_Key="tap").status_code == 500
    monkeypatch.undo()
    assert alice.post("/orders", ORDER, Idempotency_Key="tap").status_code == 201
    assert data_of(alice.get("/orders"))["total"] == 1


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize("number", [1180, 2013])
@pytest.mark.parametrize("is_done", [True, False])
def test_a_keyed_post_survives_a_commit_whose_response_is_lost(
    alice: Caller, lose_commit: Callable[..., None], number: int, is_done: bool
) -> None:
    lose_commit(number, is_done)
    assert alice.post("/orders", ORDER, Idempotency_Key="tap").status_code == 201
    assert data_of(alice.get("/orders"))["total"] == 1


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize("is_done", [True, False])
def test_a_post_without_a_key_is_503_if_the_response_to_its_commit_is_lost(
    alice: Caller, lose_commit: Callable[..., None], is_done: bool
) -> None:
    lose_commit(2013, is_done)
    assert code_of(alice.post("/orders", ORDER)) == (503, 503)
    assert data_of(alice.get("/orders"))["total"] == is_done


def test_a_key_expires_after_a_day(alice: Caller, app: Flask) -> None:
    def age(hours: float) -> None:
        with app.app_context():
            database.session.execute(update(IdempotencyKey).values(created_at=now() - timedelta(hours=hours)))
            database.session.commit()

    first = alice.post("/orders", ORDER, Idempotency_Key="tap")
    age(23.9)
    assert alice.post("/orders", ORDER, Idempotency_Key="tap").data == first.data
    age(24.1)
    assert alice.post("/orders", {"items": [ITEM]}, Idempotency_Key="another").status_code == 201
    assert stored_keys(app, alice) == {"another": alice.id}
    assert alice.post("/orders", {"items": [ITEM]}, Idempotency_Key="tap").status_code == 201


def test_expired_keys_are_found_by_an_index_however_many_a_user_has(alice: Caller, app: Flask) -> None:
    with app.app_context():
        facts = {"user_id": alice.id, "fingerprint": "", "created_at": now()}
        database.session.execute(insert(IdempotencyKey), [{**facts, "key": f"k{number}"} for number in range(2000)])
        database.session.commit()
        if database.session.get_bind().dialect.name == "mysql":
            database.session.execute(text("ANALYZE TABLE idempotency_keys"))
    with plans(app, "DELETE FROM idempotency_keys") as explained:
        assert alice.post("/orders", ORDER, Idempotency_Key="another").status_code == 201
    ((_, plan),) = explained
    assert "ix_idempotency_keys_user_id_created_at" in plan


@pytest.mark.parametrize("key", ["", "has space", "x" * 256, "é"])
def test_a_malformed_key_is_400(alice: Caller, key: str) -> None:
    assert invalid_fields(alice.post("/orders", ORDER, Idempotency_Key=key)) == {"Idempotency-Key"}


def test_a_response_is_not_replayed_to_an_administrator_of_the_past(admin: Caller) -> None:
    assert admin.post("/users", {"openid": "o-again"}, Idempotency_Key="tap").status_code == 201
    admin.store(role="user")
    assert code_of(admin.post("/users", {"openid": "o-again"}, Idempotency_Key="tap")) == (403, 403)


def test_a_response_is_deleted_with_the_user_it_is_about(admin: Caller, alice: Caller, app: Flask) -> None:
    items = f"/orders/{alice.order()['id']}/items"
    user = data_of(admin.post("/users", {"openid": "o-short-lived"}, Idempotency_Key="user"), 201)
    data_of(admin.post(items, ITEM, Idempotency_Key="item"), 201)
    data_of(admin.post("/orders", ORDER, Idempotency_Key="order"), 201)
    assert stored_keys(app, admin) == {"user": user["id"], "item": alice.id, "order": admin.id}
    data_of(admin.delete(f"/users/{user['id']}"))
    data_of(alice.delete("/users/me"))
    assert stored_keys(app, admin) == {"order": admin.id}


def test_a_user_deleted_during_the_request_creates_nothing(
    alice: Caller, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete_then_read(request: Request) -> bytes:
        data_of(alice.delete("/users/me"))
        return read_body(request)

    monkeypatch.setattr("blueprints.idempotency.read_body", delete_then_read)
    assert code_of(alice.post("/orders", ORDER, Idempotency_Key="tap")) == (401, 401)
    assert stored_keys(app, alice) == {}
