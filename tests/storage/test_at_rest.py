from collections.abc import Callable

from flask import Flask

from storage import database
from storage.models import PERSONAL_FIELDS, User
from tests.blueprints.callers import Caller, data_of
from tests.databases import Databases
from tests.harness import PERSON, Simulator, migrate


def test_nothing_personal_is_in_the_files_of_the_database(
    make_app: Callable[..., Flask], own_databases: Databases, simulator: Simulator
) -> None:
    url = own_databases.create()
    migrate(url)
    app = make_app(DATABASE_URL=url)
    caller = Caller(app, simulator)
    told = {name: value for name, value in PERSON.items() if name != "phone"}
    data_of(caller.put("/users/me", {"nickname": "this-can-be-found"}))
    data_of(caller.put("/users/me/personal-data", told))
    with app.app_context():
        database.session.get_one(User, caller.id).phone = PERSON["phone"]
        database.session.commit()
    assert data_of(caller.get("/users/me/export"))["personal_data"] == PERSON
    caller.post("/orders", {"items": [{"sku": "a", "name": "b", "quantity": 1, "unit_price": 1}]}, Idempotency_Key="k")
    app.extensions["database"].dispose()
    own_databases.stop()
    at_rest = own_databases.at_rest()
    assert b"this-can-be-found" in at_rest
    assert set(PERSON) == set(PERSONAL_FIELDS)
    assert [name for name, value in PERSON.items() if value.encode() in at_rest] == []
