"""Every write commits before it responds, and every change of a versioned row requires its current version."""

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, g
from marshmallow import Schema, fields
from sqlalchemy import select, update

from blueprints.api import Blueprint
from blueprints.policies import signed_in
from storage import database
from storage.models import Base, Order, User
from tests.blueprints.callers import ITEM, ORDER, Caller, code_of, data_of, operations
from tests.harness import PERSON, Simulator

NOT_IN_THE_DATABASE = {
    "POST /api/auth/wechat",
    "POST /api/v1/auth/wechat",
    "DELETE /api/v1/auth/session",
    "DELETE /api/v1/auth/sessions",
    "POST /api/v1/wechat/messages",
}
"""These write to Redis alone, or leave their writes to work that runs after the response."""

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


def make_new_versions(app: Flask) -> None:
    """Change the version of each row, as writers do who come first."""
    with app.app_context():
        for model in (User, Order):
            database.session.execute(update(model).values(version=model.version + 1))
        database.session.commit()


def test_every_write_commits_and_requires_the_current_version(app: Flask, simulator: Simulator) -> None:
    writes = {f"{method} {path}" for method, path in operations(app) if method not in ("GET", "HEAD")}
    assert writes >= NOT_IN_THE_DATABASE | WITHOUT_IF_MATCH
    for route in sorted(writes - NOT_IN_THE_DATABASE):
        caller = Caller(app, simulator, openid="oCaller", role="admin")
        order = caller.order()
        ids = {"user_id": caller.id, "order_id": order["id"], "item_id": order["items"][0]["id"]}
        examples = bodies(simulator, "oCaller")
        assert route in examples, f"add a body for {route} to bodies()"
        method, path = route.format(**ids).replace("/api/v1", "").split()
        headers = {}
        if method in ("PUT", "DELETE") and route not in WITHOUT_IF_MATCH:
            stale = caller.etag(path)
            make_new_versions(app)
            before, headers = stored(app), {"If_Match": caller.etag(path)}
            assert code_of(caller.call(method, path, examples[route])) == (428, 428), route
            for etag in (stale, '"another"', f"W/{headers['If_Match']}"):
                assert code_of(caller.call(method, path, examples[route], If_Match=etag)) == (412, 412), (route, etag)
            assert stored(app) == before, route
        before = stored(app)
        answer = caller.call(method, path, examples[route], **headers)
        assert answer.status_code in (200, 201), (route, answer.text)
        assert stored(app) != before, f"{route} responds with {answer.status_code} and stores nothing"


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


def test_a_post_of_any_blueprint_commits_and_takes_an_idempotency_key(grouped: Flask, simulator: Simulator) -> None:
    alice = Caller(grouped, simulator)
    assert data_of(alice.post("/group", {"nickname": "小红"}, Idempotency_Key="once")) == {"nickname": "小红"}
    assert alice.me()["nickname"] == "小红"
    assert code_of(alice.post("/group", {"nickname": "小明"}, Idempotency_Key="once")) == (409, 465)


def test_a_put_that_does_not_call_require_match_is_500_and_stores_nothing(grouped: Flask, simulator: Simulator) -> None:
    alice = Caller(grouped, simulator)
    assert alice.call("PUT", "/group", {"nickname": "小红"}, If_Match="*").status_code == 500
    assert alice.me()["nickname"] is None
