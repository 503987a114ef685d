from flask import Flask
from sqlalchemy import inspect

from storage import database, snapshots
from storage.models import User
from tests.harness import PERSON


def test_a_snapshot_has_what_the_row_has_as_it_is_committed(app: Flask) -> None:
    with app.app_context():
        user = User(app_id="wx1", openid="o-snapshot", nickname="阿狸", **PERSON)
        database.session.add(user)
        database.session.commit()
        user.nickname = "not committed"
        found = snapshots.find(User, user.id)
        database.session.rollback()
        assert found is not None
        for name in (*inspect(User).columns.keys(), *PERSON, "etag"):
            assert getattr(found, name) == getattr(user, name), name
        assert snapshots.find(User, user.id + 1) is None
        assert User.phone.model is User


def test_a_snapshot_holds_no_connection(app: Flask) -> None:
    with app.app_context():
        snapshots.find(User, 1)
        assert app.extensions["database"].pool.checkedout() == 0
