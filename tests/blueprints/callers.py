"""Users who call the application in this process."""

import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from marshmallow import Schema
from werkzeug.test import TestResponse

from blueprints import auth
from storage import database
from storage.models import User
from tests.harness import PERSON, Simulator, bearer, wait_until

API = "/api/v1"


class Caller:
    """A user who is logged in; a new one unless an openid is given."""

    def __init__(self, app: Flask, simulator: Simulator, openid: str | None = None, **values: Any) -> None:
        self.app, self.simulator = app, simulator
        self.client = app.test_client(use_cookies=False)
        self.openid = openid or f"o-{secrets.token_hex(8)}"
        self.log_in()
        if values:
            self.store(**values)

    def log_in(self) -> None:
        login = data_of(log_in(self.app, self.simulator, self.openid))
        self.id: int = login["user"]["id"]
        self.headers = bearer(login["token"])

    def store(self, **values: Any) -> None:
        """Change the row of the user in the database."""
        with self.app.app_context():
            user = database.session.get_one(User, self.id)
            for name, value in values.items():
                setattr(user, name, value)
            database.session.commit()

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> TestResponse:
        """Call `path` below the API; a header's name has `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.open(API + path, method=method, json=body, headers={**self.headers, **named})

    def get(self, path: str, **headers: str) -> TestResponse:
        return self.call("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> TestResponse:
        return self.call("POST", path, body, **headers)

    def put(self, path: str, body: Any) -> TestResponse:
        """Change the current version."""
        return self.call("PUT", path, body, If_Match=self.etag(path))

    def delete(self, path: str) -> TestResponse:
        """Delete the current version."""
        return self.call("DELETE", path, If_Match=self.etag(path))

    def etag(self, path: str) -> str:
        return self.get(path).headers.get("ETag", '"none"')

    def version(self, path: str) -> int | None:
        """The version that a body shows."""
        return data_of(self.get(path)).get("version")

    def me(self) -> dict[str, Any]:
        return data_of(self.get("/users/me"))

    def create(self, path: str, body: Any) -> Any:
        """Create something in a list, and return it."""
        return data_of(self.post(path, body), 201)

    def order(self, **different: Any) -> dict[str, Any]:
        """Create an order, and return it."""
        return self.create("/orders", {**ORDER, **different})


def examples(schema: type[Schema]) -> dict[str, Any]:
    """The examples of the fields that a client sets."""
    return {name: field.metadata["example"] for name, field in schema().fields.items() if not field.dump_only}


ITEM = {"sku": "tea-1", "name": "龙井茶", "quantity": 2, "unit_price": 1250}
ORDER = {"remark": "少糖", "items": [ITEM, {"sku": "cup", "name": "杯子", "quantity": 1, "unit_price": 500}]}


def ids_of(caller: Caller) -> dict[str, Any]:
    """For each argument of a route the id of a row that belongs to this user; a new argument has its line here."""
    order = caller.order()
    return {
        "user_id": caller.id,
        "order_id": order["id"],
        "item_id": order["items"][0]["id"],
    }


def bodies(simulator: Simulator, openid: str) -> dict[str, Any]:
    """A valid body for each operation that takes one or writes to the database; a new one has its line here."""
    return {
        "POST /api/v1/users": {"openid": f"oNew{secrets.token_hex(8)}"},
        "POST /api/v1/users/search": {"phone": PERSON["phone"]},
        "PUT /api/v1/users/{user_id}": {"nickname": "小红"},
        "DELETE /api/v1/users/{user_id}": None,
        "PUT /api/v1/users/me/phone": {"code": simulator.phone_code(openid=openid)},
        "PUT /api/v1/users/me/profile": {"nickname": "小明"},
        "PUT /api/v1/users/{user_id}/personal-data": {"email": PERSON["email"]},
        "POST /api/v1/orders": ORDER,
        "PUT /api/v1/orders/{order_id}": {"remark": "多糖"},
        "DELETE /api/v1/orders/{order_id}": None,
        "POST /api/v1/orders/{order_id}/items": ITEM,
        "PUT /api/v1/orders/{order_id}/items/{item_id}": {"quantity": 9},
        "DELETE /api/v1/orders/{order_id}/items/{item_id}": None,
    }


def log_in(app: Flask, simulator: Simulator, openid: str, **wanted: Any) -> TestResponse:
    code = simulator.code(openid=openid, **wanted)
    return app.test_client(use_cookies=False).post(f"{API}/auth/wechat", json={"code": code})


def log_in_together(app: Flask, code: str, times: int, monkeypatch: pytest.MonkeyPatch) -> list[TestResponse]:
    """Send one code several times; WeChat is called once all requests are there, however busy the machine is."""
    arrived: list[Any] = []
    single_flight, redeem = auth.single_flight, auth._redeem

    def arrive(*arguments: Any, **options: Any) -> Any:
        arrived.append(arguments)
        return single_flight(*arguments, **options)

    def wait_then_redeem(code: str) -> Any:
        wait_until(lambda: len(arrived) == times)
        return redeem(code)

    monkeypatch.setattr(auth, "single_flight", arrive)
    monkeypatch.setattr(auth, "_redeem", wait_then_redeem)
    send = lambda _: app.test_client(use_cookies=False).post(f"{API}/auth/wechat", json={"code": code})  # noqa: E731
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(send, range(times)))


def operations(app: Flask) -> list[tuple[str, str]]:
    """Every method and path that the application serves, such as ("PUT", "/api/v1/orders/{order_id}")."""
    return [
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"OPTIONS"})
    ]


def each_operation(document: dict[str, Any]) -> Any:
    """Every path, method and operation of an OpenAPI document; its responses without references."""
    shared = document["components"]["responses"]
    for path, by_method in document["paths"].items():
        for method, operation in by_method.items():
            named = {
                status: str(part.get("$ref")).rpartition("/")[2] for status, part in operation["responses"].items()
            }
            responses = {status: shared.get(name, operation["responses"][status]) for status, name in named.items()}
            yield path, method, {**operation, "responses": responses}


def operation_of(document: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    """One operation of an OpenAPI document; its responses without references."""
    (found,) = [operation for *named, operation in each_operation(document) if named == [path, method]]
    return found


def list_paths(app: Flask) -> list[str]:
    """The path of every list below the API, such as "/orders"."""
    paths = app.test_client().get("/openapi.json").get_json()["paths"]
    lists = [
        path
        for path, item in paths.items()
        for query in item.get("get", {}).get("parameters", [])
        if query.get("name") == "after"
    ]
    return [path.removeprefix(API) for path in lists]


def code_of(answer: TestResponse) -> tuple[int, int]:
    return answer.status_code, answer.get_json()["code"]


def invalid_fields(answer: TestResponse) -> set[str]:
    """The fields that a 400 names."""
    assert code_of(answer) == (400, 400), answer.text
    return set(answer.get_json()["data"]["errors"])


def data_of(answer: TestResponse, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.get_json()["data"]
