"""Every write stores what it answers, and every change of something versioned asks for its version."""

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, g
from marshmallow import Schema, fields
from sqlalchemy import select

from blueprints.api import Blueprint
from blueprints.policies import signed_in
from storage import database
from storage.models import Base, User
from tests.blueprints.callers import ITEM, ORDER, Caller, code_of, data_of, operations
from tests.harness import PERSON, Simulator

NOT_IN_THE_DATABASE = {
    "POST /api/auth/wechat",
    "POST /api/v1/auth/wechat",
    "DELETE /api/v1/auth/session",
    "DELETE /api/v1/auth/sessions",
    "POST /api/v1/wechat/messages",
}
"""What writes to Redis alone, or leaves its writes to work that runs after the response."""

WITHOUT_IF_MATCH = {
    "DELETE /api/v1/auth/session",
    "DELETE /api/v1/auth/sessions",
    "PUT /api/v1/users/me/phone",
    "PUT /api/v1/users/me/profile",
}


def bodies(simulator: Simulator, openid: str) -> dict[str, Any]:
    """A valid body for each write."""
    return {
        "POST /api/v1/users": {"openid": "oSomebodyNew"},
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


def stored(app: Flask) -> list[Any]:
    """All rows of all tables, as another connection sees them."""
    with app.app_context(), app.extensions["database"].connect() as connection:
        return [connection.execute(select(table)).all() for table in Base.metadata.sorted_tables]


def test_every_write_commits_and_asks_for_the_version(app: Flask, simulator: Simulator) -> None:
    writes = {f"{method} {path}" for method, path in operations(app) if method not in ("GET", "HEAD")}
    assert writes >= NOT_IN_THE_DATABASE | WITHOUT_IF_MATCH
    for route in sorted(writes - NOT_IN_THE_DATABASE):
        caller = Caller(app, simulator, openid="oCaller", role="admin")
        order = caller.order()
        ids = {"user_id": caller.id, "order_id": order["id"], "item_id": order["items"][0]["id"]}
        examples = bodies(simulator, "oCaller")
        assert route in examples, f"say in bodies() what {route} takes"
        method, path = route.format(**ids).replace("/api/v1", "").split()
        before = stored(app)
        if method in ("PUT", "DELETE") and route not in WITHOUT_IF_MATCH:
            assert caller.call(method, path, examples[route]).status_code == 428, route
            assert caller.call(method, path, examples[route], If_Match='"another"').status_code == 412, route
            assert stored(app) == before, route
            answer = caller.call(method, path, examples[route], If_Match=caller.etag(path))
        else:
            answer = caller.call(method, path, examples[route])
        assert answer.status_code in (200, 201), (route, answer.text)
        assert stored(app) != before, f"{route} answers {answer.status_code} and stores nothing"


class NicknameSchema(Schema):
    nickname = fields.String()


@pytest.fixture(params=[("arguments", "response"), ("response", "arguments")], ids="_".join)
def grouped(request: pytest.FixtureRequest, make_app: Callable[..., Flask]) -> Flask:
    """An application with a POST and a PUT that change the caller's nickname, their decorators in either order."""
    group = Blueprint("group", __name__)
    decorators = {"arguments": group.arguments(NicknameSchema), "response": group.response(200, NicknameSchema)}

    def view(body: dict[str, str]) -> User:
        user = database.session.get_one(User, g.user_id)
        user.nickname = body["nickname"]
        return user

    app = make_app()
    for name in reversed(request.param):
        view = decorators[name](view)
    group.route("", methods=["POST", "PUT"])(view)
    api = app.extensions["flask-smorest"]["apis"][""]["ext_obj"]
    api.register_blueprint(group, url_prefix="/api/v1/group", auth=signed_in)
    return app


def test_a_post_commits_and_can_be_repeated(grouped: Flask, simulator: Simulator) -> None:
    alice = Caller(grouped, simulator)
    first = alice.post("/group", {"nickname": "小红"}, Idempotency_Key="once")
    assert data_of(first) == data_of(alice.post("/group", {"nickname": "小红"}, Idempotency_Key="once"))
    assert data_of(alice.get("/users/me"))["nickname"] == "小红"
    assert code_of(alice.post("/group", {"nickname": "小明"}, Idempotency_Key="once")) == (409, 465)


def test_a_put_that_does_not_check_the_version_fails_and_stores_nothing(grouped: Flask, simulator: Simulator) -> None:
    alice = Caller(grouped, simulator)
    assert alice.call("PUT", "/group", {"nickname": "小红"}, If_Match="*").status_code == 500
    assert data_of(alice.get("/users/me"))["nickname"] is None
