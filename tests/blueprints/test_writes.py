"""Every write commits before it responds, and every change of a versioned row requires its current version."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, g
from marshmallow import Schema, fields
from sqlalchemy import select, update

from blueprints.api import Blueprint, register
from blueprints.policies import signed_in
from errors import Message
from storage import database
from storage.models import Base, User, Versioned
from tests.blueprints.callers import (
    API,
    Caller,
    bodies,
    code_of,
    data_of,
    each_operation,
    ids_of,
    invalid_fields,
    list_paths,
    operations,
)
from tests.harness import Simulator

NOT_IN_THE_DATABASE = {
    "POST /api/auth/wechat",
    "POST /api/v1/auth/wechat",
    "DELETE /api/v1/auth/session",
    "DELETE /api/v1/auth/sessions",
    "POST /api/v1/users/search",
    "POST /api/v1/wechat/messages",
}
"""These store nothing, write to Redis alone, or leave their writes to work that runs after the response."""

WITHOUT_IF_MATCH = {
    "DELETE /api/v1/auth/session",
    "DELETE /api/v1/auth/sessions",
    "PUT /api/v1/users/me/phone",
    "PUT /api/v1/users/me/profile",
}


def stored(app: Flask) -> list[Any]:
    """All rows of all tables, as another connection sees them."""
    with app.app_context(), app.extensions["database"].connect() as connection:
        return [connection.execute(select(table)).all() for table in Base.metadata.sorted_tables]


def make_new_versions(app: Flask) -> None:
    """Change the version of each row, as writers do who come first."""
    with app.app_context():
        for model in Versioned.__subclasses__():
            database.session.execute(update(model).values(version=model.version + 1))
        database.session.commit()


def test_every_write_commits_and_requires_the_current_version(app: Flask, simulator: Simulator) -> None:
    writes = {f"{method} {path}" for method, path in operations(app) if method not in ("GET", "HEAD")}
    assert writes >= NOT_IN_THE_DATABASE | WITHOUT_IF_MATCH
    for route in sorted(writes - NOT_IN_THE_DATABASE):
        caller = Caller(app, simulator, openid="oCaller", role="admin")
        ids = ids_of(caller)
        examples = bodies(simulator, "oCaller")
        assert route in examples, f"add a body for {route} to bodies()"
        method, path = route.format(**ids).replace("/api/v1", "").split()
        headers = {}
        if method in ("PUT", "DELETE") and route not in WITHOUT_IF_MATCH:
            stale, stale_version = caller.etag(path), caller.version(path)
            make_new_versions(app)
            before, headers = stored(app), {"If_Match": f'"{caller.version(path)}"'}
            assert code_of(caller.call(method, path, examples[route])) == (428, 428), route
            for etag in (stale, f"W/{stale}", f'"{stale_version}"', '"another"'):
                assert code_of(caller.call(method, path, examples[route], If_Match=etag)) == (412, 412), (route, etag)
            assert stored(app) == before, route
        before = stored(app)
        answer = caller.call(method, path, examples[route], **headers)
        assert answer.status_code in (200, 201), (route, answer.text)
        assert stored(app) != before, f"{route} responds with {answer.status_code} and stores nothing"


def test_every_response_about_a_versioned_row_shows_its_version(app: Flask, simulator: Simulator) -> None:
    document = app.test_client().get("/openapi.json").get_json()
    caller = Caller(app, simulator, openid="oCaller", role="admin")
    shown = set()
    for path, method, operation in each_operation(document):
        ids = ids_of(caller)
        write, headers = f"{method.upper()} {path}", {}
        if any(part.get("name") == "If-Match" for part in operation.get("parameters", [])):
            headers["If_Match"] = "*"
        if method == "delete" or not operation["security"] or (method != "get" and write in NOT_IN_THE_DATABASE):
            continue
        body = bodies(simulator, "oCaller").get(write)
        answer = caller.call(method.upper(), path.format(**ids).removeprefix(API), body, **headers)
        version = re.fullmatch(r'"[a-z_]+-\d+-(\d+)-zh"', answer.headers.get("ETag", ""))
        if version:
            shown.add(write)
            assert data_of(answer, answer.status_code)["version"] == int(version[1]), write
        documented = operation["responses"][str(answer.status_code)]["headers"]
        assert method != "get" or ("ETag" in documented) == ("ETag" in answer.headers), write
    assert len(shown) >= 13
    for path in (*list_paths(app), f"/orders/{ids['order_id']}/items"):
        for item in data_of(caller.get(path))["items"]:
            assert item["version"] == caller.version(f"{path}/{item['id']}")


@pytest.mark.parametrize(
    ("pattern", "status"),
    [
        ('"{version}"', 200),
        ("{version}", 200),
        ('"{etag}"', 200),
        ('"{etag}-zh"', 200),
        ('W/"{etag}-zh"', 200),  # as nginx's gzip makes it
        ('"{etag}-en"', 200),
        ('"{etag}-zh-gzip"', 200),  # as Apache's makes it
        ('"no", W/"users-1-1-zh" ,W/"{etag}-en"', 200),
        ("*", 200),
        ('"{version}0"', 412),
        ('"{etag}0-zh"', 412),
        ('"x{etag}-zh"', 412),
        ('"order{etag}-zh"', 412),
        ('"{etag}-zh', 428),
        ('""', 412),
        ('"{version}0", {version}', 200),
        ("W/", 428),
        ("{{}}", 428),
        ("{version} {version}", 428),
        ('{version}, "', 428),
        (",", 428),
        ("", 428),
    ],
)
def test_if_match_takes_the_version_and_whatever_proxies_make_of_the_etag(
    alice: Caller, pattern: str, status: int
) -> None:
    version = alice.me()["version"]
    if_match = pattern.format(version=version, etag=f"users-{alice.id}-{version}")
    answer = alice.call("PUT", "/users/me", {}, If_Match=if_match)
    assert answer.status_code == status
    if status == 428:  # there is one, but not one that names a version
        assert answer.get_json()["message"] == "没有有效的 If-Match 请求头：请填 version"


def test_a_read_with_if_match_is_a_read(alice: Caller) -> None:
    for path in ("/users/me", "/orders"):
        answer = alice.get(path, If_Match='"0"')  # for which werkzeug would put 412 above the body of a 200
        assert code_of(answer) == (200, 200)


def test_no_body_sets_what_the_server_sets(app: Flask, simulator: Simulator) -> None:
    caller = Caller(app, simulator, openid="oCaller", role="admin")
    for route, body in bodies(simulator, "oCaller").items():
        if body is not None:
            method, path = route.format(**ids_of(caller)).replace("/api/v1", "").split()
            for name in ("id", "user_id", "created_at", "updated_at", "version"):
                answer = caller.call(method, path, {**body, name: 1}, If_Match=caller.etag(path))
                assert name in invalid_fields(answer), (route, name)


class NicknameSchema(Schema):
    nickname = fields.String()


@pytest.fixture(params=[("arguments", "response"), ("response", "arguments")], ids="_".join)
def grouped(request: pytest.FixtureRequest, make_app: Callable[..., Flask]) -> Flask:
    """An application with a POST and a PUT that change the caller's nickname, their decorators in either order."""
    group = Blueprint("group", __name__, title=Message("", ""))
    decorators = {"arguments": group.arguments(NicknameSchema), "response": group.response(200, NicknameSchema)}

    def view(body: dict[str, str]) -> User:
        user = database.session.get_one(User, g.user_id)
        user.nickname = body["nickname"]
        return user

    app = make_app()
    for name in reversed(request.param):
        view = decorators[name](view)
    group.route("", methods=["POST", "PUT"])(view)
    register(app, group, url_prefix="/api/v1/group", auth=signed_in)
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
