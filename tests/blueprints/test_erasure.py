"""Nothing of a person is left behind by writes that race with the deletion, the merge or the cancellation."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
from flask import Flask
from redis import Redis
from sqlalchemy import select

from blueprints.message_handlers import delete_user, erase_revoked_data
from storage import database, ownership, sessions
from storage.identities import get_or_create_user
from storage.models import Base, IdempotencyKey, Order
from tests.blueprints.callers import ORDER, Caller, code_of, log_in
from tests.harness import APP_ID, WEB_APP_ID, Simulator, wait_until

ROUNDS = 8


def rows_with(app: Flask, text: str) -> list[Any]:
    """The rows of all tables in which some column contains a text."""
    with app.app_context(), app.extensions["database"].connect() as connection:
        rows = [row for table in Base.metadata.sorted_tables for row in connection.execute(select(table))]
    return [row for row in rows if any(text.encode() in _bytes(value) for value in row)]


def kept_of_users(redis: Redis) -> list[bytes]:
    """The keys of sessions, session_keys and last logins."""
    return [key for key in redis.scan_iter() if key.startswith((b"user:", b"session:", b"logins"))]


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@contextmanager
def orders_being_placed(caller: Caller) -> Iterator[list[int]]:
    """Place orders from several threads, with and without an Idempotency-Key; yields the codes of the responses."""
    codes: list[int] = []
    done = Event()

    def place(thread: int) -> None:
        body, number = {**ORDER, "remark": f"secret-of-{caller.id}-"}, 0
        while not done.is_set() and 401 not in codes[-1:]:
            number += 1
            headers = {"Idempotency_Key": f"{thread}-{number}"} if thread % 2 else {}
            codes.append(code_of(caller.post("/orders", body, **headers))[1])

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(place, thread) for thread in range(4)]
        wait_until(lambda: len(codes) > 8)
        try:
            yield codes
            time.sleep(0.05)
        finally:
            done.set()
        for thread in threads:
            thread.result()


def test_a_deletion_leaves_nothing_of_orders_that_are_being_placed(
    app: Flask, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "DETACHED_AT_ONCE", 8)  # more than are placed between two batches
    for _ in range(ROUNDS):
        caller = Caller(app, simulator)
        with orders_being_placed(caller) as codes:
            assert code_of(caller.call("DELETE", "/users/me", If_Match="*")) == (200, 200)
        assert set(codes) == {200, 401}
        assert rows_with(app, f"secret-of-{caller.id}-") == []


def test_a_cancellation_leaves_nothing_of_orders_that_are_being_placed(app: Flask, simulator: Simulator) -> None:
    for _ in range(ROUNDS):
        caller = Caller(app, simulator)
        with orders_being_placed(caller) as codes, app.app_context():
            delete_user({"OpenID": caller.openid})
        assert set(codes) == {200, 401}
        assert rows_with(app, f"secret-of-{caller.id}-") == []


def test_a_merge_loses_no_order_that_is_being_placed(app: Flask, simulator: Simulator, redis: Redis) -> None:
    for number in range(ROUNDS):
        with app.app_context():
            older = get_or_create_user(WEB_APP_ID, f"o-merge-{number}", f"u-merge-{number}").id
        caller = Caller(app, simulator)
        with orders_being_placed(caller) as codes, app.app_context():
            assert get_or_create_user(APP_ID, caller.openid, f"u-merge-{number}").id == older
        assert set(codes) == {200, 401}
        with app.app_context():
            owners = database.session.scalars(
                select(Order.user_id).where(Order.remark == f"secret-of-{caller.id}-")
            ).all()
        assert owners == [older] * codes.count(200)
        assert kept_of_users(redis) == []


def test_a_login_during_a_deletion_leaves_no_session_and_no_session_key(
    app: Flask, simulator: Simulator, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(app, simulator)
    etag = caller.etag("/users/me")
    start_session: Callable[..., str] = sessions.log_in

    def delete_first(user_id: int, **facts: Any) -> str:
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(caller.call, "DELETE", "/users/me", If_Match=etag).result().status_code == 200
        return start_session(user_id, **facts)

    monkeypatch.setattr(sessions, "log_in", delete_first)
    assert code_of(log_in(app, simulator, caller.openid)) == (503, 503)
    assert kept_of_users(redis) == []
    assert log_in(app, simulator, caller.openid).status_code == 200


@pytest.mark.parametrize("erase", [erase_revoked_data, delete_user])
def test_stored_responses_about_a_user_go_with_the_data(
    app: Flask, simulator: Simulator, admin: Caller, erase: Callable[[Any], None]
) -> None:
    openid = f"o-answers-{erase.__name__}"
    body = {"openid": openid, "nickname": "secret-nickname"}
    assert admin.post("/users", body, Idempotency_Key="tap").status_code == 201
    caller = Caller(app, simulator, openid=openid)
    assert caller.post("/orders", ORDER, Idempotency_Key="tap").status_code == 201
    with app.app_context():
        erase({"OpenID": openid, "RevokeInfo": "19"})
    assert rows_with(app, "secret-nickname") == []
    with app.app_context():
        kept = database.session.scalars(select(IdempotencyKey.key).where(IdempotencyKey.user_id == caller.id)).all()
    assert kept == (["tap"] if erase is erase_revoked_data else [])
