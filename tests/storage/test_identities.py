from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import pymysql
import pytest
from flask import Flask
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from storage import database, identities
from storage.identities import find_openid, get_or_create_user
from storage.models import PERSONAL_FIELDS, IdempotencyKey, Identity, Order, User
from tests.harness import having

MINI, WEB = "wx-mini", "wx-web"
numbers = count()


@pytest.fixture
def name(app: Flask) -> str:
    """A part of openids and unionids that no other test uses."""
    return f"user-{next(numbers)}"


@pytest.fixture(autouse=True)
def in_the_application(app: Flask) -> Any:
    with app.app_context():
        yield


def test_the_same_openid_of_another_app_is_another_user(name: str) -> None:
    ids = [get_or_create_user(app_id, name, None).id for app_id in (MINI, WEB, MINI)]
    assert ids[0] != ids[1]
    assert ids[0] == ids[2]


def test_the_same_unionid_in_another_app_is_the_same_user(name: str) -> None:
    mini = get_or_create_user(MINI, f"m-{name}", name)
    assert get_or_create_user(WEB, f"w-{name}", name).id == mini.id
    assert (find_openid(mini.id, MINI), find_openid(mini.id, WEB)) == (f"m-{name}", f"w-{name}")
    assert find_openid(mini.id, "wx-third") is None


def test_a_later_unionid_is_stored_and_kept(name: str) -> None:
    first = get_or_create_user(MINI, name, None)
    assert get_or_create_user(MINI, name, f"u-{name}").id == first.id
    assert get_or_create_user(MINI, name, None).unionid == f"u-{name}"
    assert get_or_create_user(MINI, name, f"v-{name}").unionid == f"v-{name}"


def test_merged_users_become_the_older_one_with_all_their_data(name: str) -> None:
    older = get_or_create_user(MINI, f"m-{name}", None)
    older.nickname = "阿上"
    database.session.commit()
    younger = get_or_create_user(WEB, f"w-{name}", f"u-{name}")
    younger.nickname, younger.role = "another", "admin"
    for field in PERSONAL_FIELDS:
        setattr(younger, field, f"{field} of {name}")
    older.email = f"own email of {name}"
    database.session.commit()
    one = get_or_create_user(MINI, f"m-{name}", f"u-{name}")
    assert one.id == older.id
    assert (one.nickname, one.role, one.unionid) == ("阿上", "admin", f"u-{name}")
    personal = {field: getattr(one, field) for field in PERSONAL_FIELDS}
    assert personal == {field: f"{field} of {name}" for field in PERSONAL_FIELDS} | {"email": f"own email of {name}"}
    assert database.session.scalars(select(User.id).where(having("phone", f"phone of {name}"))).all() == [one.id]
    assert database.session.get(User, younger.id) is None
    assert get_or_create_user(WEB, f"w-{name}", None).id == older.id


def test_merging_moves_orders_and_idempotency_keys(name: str) -> None:
    older, younger = get_or_create_user(MINI, f"m-{name}", None), get_or_create_user(WEB, f"w-{name}", f"u-{name}")
    for user, keys in ((older, ["both", "older"]), (younger, ["both", "younger"])):
        database.session.add(Order(user_id=user.id, total=0))
        database.session.add_all(
            IdempotencyKey(user_id=user.id, about_user_id=user.id, key=key, fingerprint=str(user.id), status=201)
            for key in keys
        )
    database.session.commit()
    one = get_or_create_user(MINI, f"m-{name}", f"u-{name}")
    orders = database.session.scalars(select(Order).where(Order.user_id == one.id).order_by(Order.id)).all()
    assert [order.version for order in orders] == [1, 2]
    kept = database.session.scalars(select(IdempotencyKey).where(IdempotencyKey.user_id == one.id)).all()
    assert {record.key: record.fingerprint for record in kept} == {
        "both": str(older.id),
        "older": str(older.id),
        "younger": str(younger.id),
    }


def test_a_user_without_an_identity_of_an_older_version_is_found(name: str) -> None:
    database.insert_unless_exists(User, app_id=MINI, openid=name)
    database.session.commit()
    (user_id,) = database.session.scalars(select(User.id).where(User.openid == name))
    assert get_or_create_user(MINI, name, None).id == user_id
    assert find_openid(user_id, MINI) == name


def test_a_user_of_an_older_version_is_merged_by_unionid(name: str) -> None:
    web = get_or_create_user(WEB, f"w-{name}", f"u-{name}")
    database.insert_unless_exists(User, app_id=MINI, openid=name)
    database.session.commit()
    assert get_or_create_user(MINI, name, f"u-{name}").id == web.id
    assert database.session.scalars(select(User.id).where(User.openid == name)).all() == []


@contextmanager
def listening(*listener: Any) -> Iterator[None]:
    event.listen(*listener)
    try:
        yield
    finally:
        event.remove(*listener)


def at_once(app: Flask, *calls: tuple[str, str, str | None]) -> list[int]:
    def call(arguments: tuple[str, str, str | None]) -> int:
        with app.app_context():
            return get_or_create_user(*arguments).id

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def test_simultaneous_first_logins_in_two_apps_create_one_user(app: Flask, name: str) -> None:
    for round_ in range(10):
        unionid = f"{name}-{round_}"
        calls = [(app_id, f"{app_id}-{unionid}", unionid) for app_id in (MINI, WEB) * 4]
        assert len(set(at_once(app, *calls))) == 1
        database.session.rollback()  # to see the current rows
        rows = database.session.scalars(select(User.id).where(User.unionid == unionid)).all()
        assert len(rows) == 1
        linked = database.session.scalars(select(Identity.user_id).where(Identity.openid.endswith(unionid))).all()
        assert linked == rows * 2


def test_simultaneous_logins_with_a_new_unionid_merge_two_users(app: Flask, name: str) -> None:
    for round_ in range(10):
        unionid = f"{name}-{round_}"
        ids = at_once(app, (MINI, unionid, None), (WEB, unionid, None))
        assert len(set(ids)) == 2
        at_once(app, *[(app_id, unionid, unionid) for app_id in (MINI, WEB) * 4])
        assert set(at_once(app, (MINI, unionid, unionid), (WEB, unionid, unionid))) == {min(ids)}
        database.session.rollback()
        assert database.session.get(User, max(ids)) is None


@pytest.mark.only_on("mariadb")  # SQLite has one writer at a time
def test_a_login_that_finds_a_user_who_is_being_merged_gets_the_one_who_stays(app: Flask, name: str) -> None:
    stays = get_or_create_user(WEB, f"w-{name}", f"u-{name}").id
    get_or_create_user(MINI, name, None)
    get_or_create_user("wx-third", f"t-{name}", f"v-{name}")
    merging = [(MINI, name, f"u-{name}")]

    def merge_first(*execution: Any) -> None:
        if execution[2].endswith("FOR UPDATE") and merging:
            assert at_once(app, merging.pop()) == [stays]

    with listening(app.extensions["database"], "before_cursor_execute", merge_first):
        assert get_or_create_user(MINI, name, f"v-{name}").id == stays
    assert not merging
    assert get_or_create_user("wx-third", f"t-{name}", f"v-{name}").id == stays


@pytest.mark.parametrize(
    ("number", "statement", "again"),
    [(1213, "", True), (1213, None, True), (1020, "", True), (2013, "", True), (2013, None, False), (1114, "", False)],
)
def test_only_a_transaction_that_has_committed_nothing_is_retried(
    name: str, monkeypatch: pytest.MonkeyPatch, number: int, statement: str | None, again: bool
) -> None:
    """Of a COMMIT there is no statement."""
    merge: Callable[..., User] = identities._merge
    errors = [OperationalError(statement, {}, pymysql.err.OperationalError(number, "said by the server"))]

    def merge_the_second_time(*arguments: Any) -> User:
        if errors:
            raise errors.pop()
        return merge(*arguments)

    monkeypatch.setattr(identities, "_merge", merge_the_second_time)
    if again:
        assert get_or_create_user(MINI, name, None).openid == name
    else:
        with pytest.raises(OperationalError):
            get_or_create_user(MINI, name, None)


def test_an_identity_is_deleted_with_its_user(name: str) -> None:
    database.session.delete(get_or_create_user(MINI, name, None))
    database.session.commit()
    assert database.session.get(Identity, (MINI, name)) is None
