from datetime import UTC, datetime, timedelta

import pytest
from flask import Flask
from flask.testing import FlaskClient

from blueprints.users import get_or_create_user
from storage import database
from storage.models import User
from tests.harness import bearer

ME = "/api/v1/users/me"


def test_a_user_reads_himself(client: FlaskClient, token: str) -> None:
    user = client.get(ME, headers=bearer(token)).get_json()["data"]
    assert list(user) == ["id", "nickname", "avatar_url", "phone", "role", "created_at", "updated_at"]
    assert (user["nickname"], user["avatar_url"], user["phone"], user["role"]) == (None, None, None, "user")
    created = datetime.fromisoformat(user["created_at"])
    assert created.utcoffset() == timedelta(0)
    assert timedelta(0) <= datetime.now(UTC) - created < timedelta(minutes=1)


def test_his_phone_number_is_masked(app: Flask, client: FlaskClient, token: str) -> None:
    user_id = client.get(ME, headers=bearer(token)).get_json()["data"]["id"]
    with app.app_context():
        database.session.get_one(User, user_id).phone = "13812345678"
        database.session.commit()
    answer = client.get(ME, headers=bearer(token))
    assert answer.get_json()["data"]["phone"] == "138****5678"
    assert "13812345678" not in answer.text


def test_the_same_openid_under_another_app_is_somebody_else(app: Flask) -> None:
    with app.app_context():
        ids = [get_or_create_user(app_id, "o-same", None).id for app_id in ("wx-one", "wx-other", "wx-one")]
    assert ids[0] != ids[1]
    assert ids[0] == ids[2]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Basic eDp5"}])
def test_without_a_session_nobody_is_read(client: FlaskClient, headers: dict[str, str]) -> None:
    answer = client.get(ME, headers=headers)
    assert (answer.status_code, answer.get_json()["code"]) == (401, 401)


def test_the_session_of_a_user_who_is_gone_is_nobodys(app: Flask, client: FlaskClient, token: str) -> None:
    user_id = client.get(ME, headers=bearer(token)).get_json()["data"]["id"]
    with app.app_context():
        database.session.delete(database.session.get_one(User, user_id))
        database.session.commit()
    assert client.get(ME, headers=bearer(token)).status_code == 401
