"""Any body and any query is cheap to refuse, and the refusal is small."""

import io
import json
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from marshmallow import Schema, fields

from blueprints.api import Blueprint, register
from blueprints.parsing import MAXIMUM_LENGTH, SMALL_BODY
from errors import Message
from tests.blueprints.callers import API, ITEM, ORDER, Caller, bodies, code_of, data_of, ids_of, invalid_fields
from tests.harness import Simulator

LARGEST_REFUSAL = 16 * 1024
TOO_LONG = "More than 100 fields in an object or items in a list, or a field twice."
LARGER_BODIES = {
    "POST /api/v1/orders": 128 * 1024,
    "PUT /api/v1/users/me/phone": 64 * 1024,
    "PUT /api/v1/users/me/profile": 64 * 1024,
}
LOGINS = ("/api/v1/auth/wechat", "/api/auth/wechat")


def test_a_list_that_is_too_long_is_400_for_its_length_alone(alice: Caller) -> None:
    for body in ({"items": [{}] * 101}, {"items": [{"a": 1}] * 10_000}, {"items": [1] * 30_000}, {"no": [1] * 101}):
        answer = alice.post("/orders", body)
        assert code_of(answer) == (400, 400)
        assert answer.get_json()["data"]["errors"] == {"body": [TOO_LONG]}
    answer = alice.post("/orders", {"items": []})
    assert answer.get_json()["data"]["errors"] == {"items": ["Length must be between 1 and 100."]}
    assert len(alice.order(items=[ITEM] * 100)["items"]) == 100


def operations_with_a_body(client: FlaskClient) -> list[str]:
    paths = client.get("/openapi.json").get_json()["paths"]
    found = [f"{method.upper()} {path}" for path, item in paths.items() for method in item if method != "parameters"]
    return [
        operation
        for operation in found
        if "requestBody" in paths[operation.split()[1]][operation.split()[0].lower()]
        and not operation.endswith("/wechat/messages")
    ]


def test_each_route_has_its_own_limit_and_it_is_small(app: Flask, simulator: Simulator) -> None:
    admin = Caller(app, simulator, role="admin")
    ids = ids_of(admin)
    operations = operations_with_a_body(admin.client)
    assert set(LARGER_BODIES) < set(operations)
    for operation in operations:
        method, path = operation.format(**ids).split()
        limit = LARGER_BODIES.get(operation, SMALL_BODY)
        headers = {**admin.headers, "Content-Type": "application/json", "If-Match": '"x"', "Idempotency-Key": "k"}
        for stream in ({"data": b" " * (limit + 1)}, {"data": b" " * limit + b"{"}, streamed(b" " * (limit + 1))):
            answer = admin.client.open(path, method=method, headers=headers, **stream)
            assert code_of(answer) == (413, 413), operation
            assert answer.get_json()["data"] == {"errors": {"body": [f"At most {limit} bytes."]}}
        longest = b"{" + b" " * (limit - 1)
        for stream in ({"data": longest}, streamed(longest), streamed(longest, CONTENT_LENGTH=str(limit))):
            answer = admin.client.open(path, method=method, headers=headers, **stream)
            assert invalid_fields(answer) == {"body"}, operation


def test_the_document_says_how_long_a_body_may_be(client: FlaskClient) -> None:
    paths = client.get("/openapi.json").get_json()["paths"]
    limits = {**dict.fromkeys(operations_with_a_body(client), SMALL_BODY), **LARGER_BODIES}
    for operation, limit in limits.items():
        method, path = operation.split()
        assert paths[path][method.lower()]["requestBody"]["description"] == f"最大 {limit} 字节", operation


def streamed(body: bytes, **environ: str) -> dict[str, Any]:
    """A body whose end the server knows, as gunicorn does, with or without a Content-Length."""
    return {"input_stream": io.BytesIO(body), "environ_overrides": {"wsgi.input_terminated": True, **environ}}


def test_the_largest_valid_order_fits(alice: Caller) -> None:
    item = {"sku": "茶" * 64, "name": "茶" * 128, "quantity": 9999, "unit_price": 10**9}
    body = {"remark": "茶" * 500, "items": [item] * 100}
    for ensure_ascii in (True, False):
        headers = {**alice.headers, "Content-Type": "application/json"}
        text = json.dumps(body, ensure_ascii=ensure_ascii)
        assert data_of(alice.client.post(f"{API}/orders", data=text, headers=headers), 201)["remark"] == "茶" * 500


def many(count: int, name: str = "") -> dict[str, int]:
    return {f"{name}{number:x}": 1 for number in range(count)}


@pytest.mark.parametrize(
    "body",
    [
        many(1000),
        many(MAXIMUM_LENGTH),
        many(MAXIMUM_LENGTH, "\x00" * 70),
        {"items": [many(MAXIMUM_LENGTH, "名" * 20)]},
        {"items": [many(MAXIMUM_LENGTH + 1)]},
        {"items": [{"a": 1}] * 100},
        {"\x00" * 1300: 1},
        {"x" * 8000: 1},
        {"a": [many(MAXIMUM_LENGTH + 1)]},
    ],
)
def test_a_refusal_is_small_and_names_20_fields_at_most(app: Flask, simulator: Simulator, body: Any) -> None:
    admin = Caller(app, simulator, role="admin")
    ids = ids_of(admin)
    for operation in [*operations_with_a_body(admin.client), "POST /api/auth/wechat"]:
        method, path = operation.format(**ids).split()
        answer = admin.client.open(path, method=method, json=body, headers={**admin.headers, "If-Match": '"x"'})
        assert answer.status_code in (400, 413), operation
        assert len(answer.data) <= LARGEST_REFUSAL
        assert 0 < leaves(answer.get_json()["data"]["errors"]) <= 20
        assert "\x00" * 70 not in str(answer.get_json())


def leaves(errors: Any) -> int:
    return sum(map(leaves, errors.values())) if isinstance(errors, dict) else 1


def test_a_query_with_many_names_is_refused_in_short(alice: Caller) -> None:
    for query in ("&".join(many(2000)), "&".join(many(100)) + "&x" * 2000, "x" * 4000):
        answer = alice.get(f"/orders?{query}")
        assert code_of(answer) == (400, 400)
        assert len(answer.data) <= LARGEST_REFUSAL
        assert 0 < leaves(answer.get_json()["data"]["errors"]) <= 20


def test_an_object_with_too_many_fields_or_one_of_them_twice_is_400(alice: Caller) -> None:
    for text in (
        json.dumps(many(MAXIMUM_LENGTH + 1)),
        json.dumps({"items": [many(MAXIMUM_LENGTH + 1)]}),
        '{"remark": "a", "remark": "b"}',
        '{"items": [{"sku": "a", "sku": "a"}]}',
    ):
        headers = {**alice.headers, "Content-Type": "application/json"}
        answer = alice.client.post(f"{API}/orders", data=text, headers=headers)
        assert answer.get_json()["data"]["errors"] == {"body": [TOO_LONG]}


def test_no_body_is_400_wherever_the_document_requires_one(app: Flask, simulator: Simulator) -> None:
    admin = Caller(app, simulator, role="admin")
    ids = ids_of(admin)
    for operation in operations_with_a_body(admin.client):
        method, path = operation.format(**ids).split()
        answer = admin.client.open(path, method=method, headers={**admin.headers, "If-Match": "*"})
        assert invalid_fields(answer) == {"body"}, operation


def test_a_number_without_a_fraction_is_an_integer(alice: Caller) -> None:
    headers = {**alice.headers, "Content-Type": "application/json"}

    def order(quantity: str) -> Any:
        text = json.dumps({"items": [ITEM]}).replace('"quantity": 2', f'"quantity": {quantity}')
        return alice.client.post(f"{API}/orders", data=text, headers=headers)

    for quantity in ("3.0", "3e0", "0.3e1"):
        assert data_of(order(quantity), 201)["items"][0]["quantity"] == 3
    for quantity in ("3.5", "3e-1", "1e999", "1e300", "NaN", "-Infinity", '"3"', "true"):
        assert invalid_fields(order(quantity)) == {"items"}


def test_the_first_errors_of_a_list_are_named_in_full(alice: Caller) -> None:
    answer = alice.post("/orders", {"items": [ITEM, {"sku": "", "quantity": 0}]})
    wrong = answer.get_json()["data"]["errors"]["items"]["1"]
    assert set(wrong) == {"sku", "name", "quantity", "unit_price"}


@pytest.mark.parametrize("path", LOGINS)
@pytest.mark.parametrize(
    "content_type",
    ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data", "nonsense", "", None],
)
def test_a_login_is_json_whatever_its_content_type_says(
    client: FlaskClient, simulator: Simulator, path: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post(path, data=json.dumps({"code": simulator.code()}), headers=headers)
    assert data_of(answer)["token"]


def test_no_other_route_takes_text_as_json(app: Flask, simulator: Simulator) -> None:
    admin = Caller(app, simulator, role="admin")
    valid = bodies(simulator, admin.openid)
    ids = ids_of(admin)
    with_body = set(operations_with_a_body(admin.client)) - {"POST /api/v1/auth/wechat"}
    assert with_body
    for operation in with_body:
        method, path = operation.format(**ids).split()
        for content_type in ("text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "nonsense"):
            headers = {**admin.headers, "If-Match": '"x"', "Content-Type": content_type}
            text = json.dumps(valid.get(operation, ORDER))
            answer = admin.client.open(path, method=method, data=text, headers=headers)
            assert code_of(answer) == (415, 415), operation


def test_a_parser_of_queries_leaves_the_limit_of_the_body(make_app: Any, simulator: Simulator) -> None:
    app = make_app()
    group = Blueprint("group", __name__, title=Message("", ""))

    class Body(Schema):
        MAXIMUM_BYTES = 20_000
        text = fields.String()

    class Query(Schema):
        page = fields.Integer()

    @group.route("/", methods=["POST"])
    @group.arguments(Body)
    @group.arguments(Query, location="query")
    @group.response(200, transaction=False)
    def view(body: Any, query: Any) -> None:
        assert len(body["text"]) == 15_000

    from blueprints.policies import public

    register(app, group, url_prefix="/group", auth=public)
    assert app.test_client().post("/group/?page=1", json={"text": "x" * 15_000}).status_code == 200
