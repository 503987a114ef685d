from collections.abc import Callable

from flask import Flask
from redis import Redis

from storage.models import PERSONAL_FIELDS
from tests.blueprints.callers import Caller, data_of
from tests.databases import Databases
from tests.harness import PERSON, Simulator, migrate


def test_neither_database_files_nor_redis_contain_personal_data_or_secrets(
    make_app: Callable[..., Flask],
    own_databases: Databases,
    redis: Redis,
    simulator: Simulator,
    environ: dict[str, str],
) -> None:
    url = own_databases.create()
    migrate(url)
    app = make_app(DATABASE_URL=url)
    caller = Caller(app, simulator, openid="o-at-rest", nickname="this-can-be-found", **PERSON)
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
