"""People who call the application in this process."""

import re
from typing import Any

from flask import Flask
from werkzeug.test import TestResponse

from storage import database
from storage.models import User
from tests.harness import Simulator, bearer

API = "/api/v1"


class Caller:
    """Somebody who is logged in."""

    def __init__(self, app: Flask, simulator: Simulator, openid: str | None = None, role: str = "user") -> None:
        self.app, self.client = app, app.test_client(use_cookies=False)
        code = simulator.code(**({"openid": openid} if openid else {}))
        login = self.client.post(f"{API}/auth/wechat", json={"code": code}).get_json()["data"]
        self.id: int = login["user"]["id"]
        self.headers = bearer(login["token"])
        if role != "user":
            with app.app_context():
                database.session.get_one(User, self.id).role = role
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
        """Change what is there now."""
        return self.call("PUT", path, body, If_Match=self.etag(path))

    def delete(self, path: str) -> TestResponse:
        """Delete what is there now."""
        return self.call("DELETE", path, If_Match=self.etag(path))

    def etag(self, path: str) -> str:
        return self.get(path).headers.get("ETag", '"none"')

    def order(self, **different: Any) -> dict[str, Any]:
        """Order something, and answer the order."""
        return data_of(self.post("/orders", {**ORDER, **different}), 201)


ITEM = {"sku": "tea-1", "name": "龙井茶", "quantity": 2, "unit_price": 1250}
ORDER = {"remark": "少糖", "items": [ITEM, {"sku": "cup", "name": "杯子", "quantity": 1, "unit_price": 500}]}


def operations(app: Flask) -> list[tuple[str, str]]:
    """Every method and path that the application serves, such as ("PUT", "/api/v1/orders/{order_id}")."""
    return [
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"OPTIONS"})
    ]


def code_of(answer: TestResponse) -> tuple[int, int]:
    return answer.status_code, answer.get_json()["code"]


def data_of(answer: TestResponse, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.get_json()["data"]
