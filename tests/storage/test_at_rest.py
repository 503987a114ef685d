from collections.abc import Callable

from flask import Flask
from redis import Redis

from storage import database
from storage.models import PERSONAL_FIELDS, User
from tests.blueprints.callers import Caller, data_of
from tests.databases import Databases
from tests.harness import PERSON, Simulator, migrate


def test_nothing_personal_and_no_secret_is_in_the_files_of_the_database_or_in_redis(
    make_app: Callable[..., Flask],
    own_databases: Databases,
    redis: Redis,
    simulator: Simulator,
    environ: dict[str, str],
) -> None:
    url = own_databases.create()
    migrate(url)
    app = make_app(DATABASE_URL=url)
    caller = Caller(app, simulator, openid="o-at-rest")
    personal = {name: value for name, value in PERSON.items() if name != "phone"}
    data_of(caller.put("/users/me", {"nickname": "this-can-be-found"}))
    data_of(caller.put("/users/me/personal-data", personal))
    with app.app_context():
        database.session.get_one(User, caller.id).phone = PERSON["phone"]
        database.session.commit()
    assert data_of(caller.get("/users/me/export"))["personal_data"] == PERSON
    caller.post("/orders", {"items": [{"sku": "a", "name": "b", "quantity": 1, "unit_price": 1}]}, Idempotency_Key="k")
    secrets = {environ["SECRET_KEY"], environ["ENCRYPTION_KEYS"], *simulator.secrets()} - {"o-at-rest"}
    secrets |= {caller.headers["Authorization"].split()[1], simulator.session_key("o-at-rest")}
    app.extensions["database"].dispose()
    own_databases.stop()

    at_rest = own_databases.at_rest() + b"".join(key + contents(redis, key) for key in redis.scan_iter())
    assert b"this-can-be-found" in at_rest
    assert b"o-at-rest" in at_rest
    assert set(PERSON) == set(PERSONAL_FIELDS)
    assert [value for value in {*PERSON.values(), *secrets} if value.encode() in at_rest] == []


def contents(redis: Redis, key: bytes) -> bytes:
    return redis.get(key) if redis.type(key) == b"string" else b"".join(redis.zrange(key, 0, -1))
