import json
from typing import Any

import pytest
from flask import Flask

from storage import database
from storage.models import PERSONAL_FIELDS, User
from tests.blueprints.callers import Caller, code_of, data_of
from tests.harness import PERSON, Simulator

PATH = "/users/me/personal-data"
MASKED = {
    "phone": "138****5678",
    "real_name": "欧**",
    "id_card": "110***********002X",
    "email": "o***@example.com",
    "bank_card": "***************0123",
}


@pytest.fixture
def alice(app: Flask, simulator: Simulator) -> Caller:
    """Somebody of whom we know everything."""
    caller = Caller(app, simulator)
    told = {name: value for name, value in PERSON.items() if name != "phone"}
    data_of(caller.put(PATH, told))
    with app.app_context():
        database.session.get_one(User, caller.id).phone = PERSON["phone"]
        database.session.commit()
    return caller


def audits(log_lines: Any) -> list[tuple[str, int, int]]:
    lines = [line for line in log_lines() if line["message"] == "audit"]
    return [(line["event"], line["aboutUserId"], line["userId"]) for line in lines]


def test_it_is_masked_for_oneself_and_for_administrators(alice: Caller, app: Flask, simulator: Simulator) -> None:
    admin = Caller(app, simulator, role="admin")
    assert set(MASKED) == set(PERSONAL_FIELDS) == set(PERSON)
    assert data_of(alice.get(PATH)) == MASKED
    assert data_of(admin.get(f"/users/{alice.id}/personal-data")) == MASKED
    assert data_of(alice.put(PATH, {})) == MASKED


def test_it_is_told_in_full_on_one_way_which_is_logged_without_it(
    alice: Caller, app: Flask, simulator: Simulator, log_lines: Any
) -> None:
    admin = Caller(app, simulator, role="admin")
    assert data_of(alice.get(f"{PATH}/full")) == PERSON
    assert data_of(admin.get(f"/users/{alice.id}/personal-data/full")) == PERSON
    assert audits(log_lines) == [
        ("personal data read in full", alice.id, alice.id),
        ("personal data read in full", alice.id, admin.id),
    ]
    logged = json.dumps(log_lines(), ensure_ascii=False)
    assert not [value for value in PERSON.values() if value in logged]


def test_what_is_not_told_is_null(app: Flask, simulator: Simulator) -> None:
    caller = Caller(app, simulator)
    assert data_of(caller.get(PATH)) == data_of(caller.get(f"{PATH}/full")) == dict.fromkeys(MASKED)


def test_a_change_leaves_the_rest_and_null_erases(alice: Caller, log_lines: Any) -> None:
    assert data_of(alice.put(PATH, {"real_name": "李四", "email": None})) == {
        **MASKED,
        "real_name": "李*",
        "email": None,
    }
    assert audits(log_lines) == [("personal data changed", alice.id, alice.id)]
    assert code_of(alice.call("PUT", PATH, {"email": None})) == (428, 428)
    assert code_of(alice.call("PUT", PATH, {"email": None}, If_Match='"0"')) == (412, 412)


@pytest.mark.parametrize(
    "body",
    [
        {"phone": "13812345678"},
        {"real_name": ""},
        {"real_name": " "},
        {"email": "汉" * 100 + "@example.com"},
        {"real_name": "x" * 65},
        {"id_card": "11010119491231002"},
        {"id_card": "11010119491231002X\n"},
        {"id_card": "１１０１０１１９４９１２３１００２X"},
        {"email": "nobody"},
        {"bank_card": "1" * 11},
        {"bank_card": "1" * 20},
        {"nickname": "x"},
    ],
)
def test_what_cannot_be_is_400_and_named(alice: Caller, body: dict[str, str]) -> None:
    answer = alice.put(PATH, body)
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == set(body)
    assert not [value for value in body.values() if len(value) > 5 and value in answer.text]
    assert data_of(alice.get(PATH)) == MASKED


def test_all_that_is_held_can_be_taken_along(alice: Caller, log_lines: Any) -> None:
    order = alice.order()
    export = data_of(alice.get("/users/me/export"))
    assert set(export) == {"user", "unionid", "personal_data", "identities", "orders"}
    assert export["personal_data"] == PERSON
    assert export["user"]["id"] == alice.id
    assert [list(identity) for identity in export["identities"]] == [["app_id", "openid", "created_at"]]
    assert export["orders"] == [order]
    assert audits(log_lines)[-1] == ("user exported", alice.id, alice.id)
