import json
from typing import Any

import pytest
from flask import Flask
from werkzeug.test import TestResponse

from blueprints import orders, personal_data
from storage import database, ownership
from storage.models import PERSONAL_FIELDS, Identity
from tests.blueprints.callers import Caller, data_of, invalid_fields
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
    """A user with all personal data."""
    return Caller(app, simulator, **PERSON)


def shown(answer: TestResponse) -> dict[str, Any]:
    """The fields of a response without the version, which all of a user's share."""
    data = data_of(answer)
    assert data.pop("version") >= 1
    return data


def audits(log_lines: Any) -> list[tuple[str, int, int]]:
    lines = [line for line in log_lines() if line["message"] == "audit"]
    return [(line["event"], line["aboutUserId"], line["userId"]) for line in lines]


def test_users_and_administrators_read_it_masked_or_in_full_which_is_logged(
    alice: Caller, admin: Caller, log_lines: Any
) -> None:
    assert set(MASKED) == set(PERSONAL_FIELDS) == set(PERSON)
    for user, path in ((alice, PATH), (admin, f"/users/{alice.id}/personal-data")):
        assert shown(user.get(path)) == shown(user.put(path, {})) == MASKED
        assert shown(user.get(f"{path}/full")) == PERSON
    assert [audit for audit in audits(log_lines) if "full" in audit[0]] == [
        ("personal data read in full", alice.id, alice.id),
        ("personal data read in full", alice.id, admin.id),
    ]
    assert PERSON["real_name"] not in str(log_lines())  # which is too short for `journal`


def test_missing_fields_are_null(app: Flask, simulator: Simulator) -> None:
    caller = Caller(app, simulator)
    assert shown(caller.get(PATH)) == shown(caller.get(f"{PATH}/full")) == dict.fromkeys(MASKED)


def test_a_change_keeps_fields_that_it_does_not_name_and_null_erases(alice: Caller, log_lines: Any) -> None:
    change, expected = {"real_name": "李四", "email": None}, {**PERSON, "real_name": "李四", "email": None}
    assert shown(alice.put(PATH, change)) == {**MASKED, "real_name": "李*", "email": None}
    assert audits(log_lines) == [("personal data changed", alice.id, alice.id)]
    assert shown(alice.get(f"{PATH}/full")) == expected


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
def test_invalid_input_names_the_fields_without_their_values(alice: Caller, body: dict[str, str]) -> None:
    answer = alice.put(PATH, body)
    assert invalid_fields(answer) == set(body)
    assert not [value for value in body.values() if len(value) > 5 and value in answer.text]
    assert shown(alice.get(PATH)) == MASKED


def test_an_export_is_read_in_parts_that_hold_no_connection(
    alice: Caller, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "EXPORTED_AT_ONCE", 2)
    openids = [f"o{number}-{alice.id}" for number in range(4)]
    with app.app_context():
        database.session.add_all(
            Identity(app_id=f"wy-{number // 2}", openid=openid, user_id=alice.id)
            for number, openid in enumerate(openids)
        )
        database.session.commit()
    placed = [alice.order() for _ in range(5)]
    answer = alice.get("/users/me/export")
    parts = []
    for part in answer.response:
        parts.append(part)
        assert app.extensions["database"].pool.checkedout() == 0
    answer.close()
    assert len(parts) > 8
    exported = json.loads(b"".join(parts))
    assert (list(exported), exported["code"], exported["message"]) == (["code", "message", "data"], 200, "操作成功")
    assert exported["data"]["orders"] == placed
    assert [identity["openid"] for identity in exported["data"]["identities"]] == [alice.openid, *openids]


def test_an_export_that_breaks_off_is_logged_with_its_trace_id_and_is_no_json(
    alice: Caller, app: Flask, log_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.order()
    parts = []
    with monkeypatch.context() as patch:
        patch.setattr(orders.OrderSchema, "dump", lambda *args, **options: 1 / 0)
        answer = alice.get("/users/me/export")
        with pytest.raises(ZeroDivisionError):
            parts.extend(answer.response)
        answer.close()
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(b"".join(parts))
    (line,) = [line for line in log_lines() if line["level"] == "ERROR"]
    assert (line["message"], line["traceId"]) == ("an export broke off", answer.headers["X-Trace-Id"])
    assert "ZeroDivisionError" in line["stack"]
    assert (line["userId"], app.extensions["database"].pool.checkedout()) == (alice.id, 0)
    assert data_of(alice.get("/users/me/export"))["user"]["id"] == alice.id


def test_the_head_of_an_export_reads_nothing_and_has_no_etag(alice: Caller, log_lines: Any) -> None:
    answer = alice.call("HEAD", "/users/me/export", If_None_Match="*")
    assert (answer.status_code, answer.data, "ETag" in answer.headers) == (200, b"", False)
    assert audits(log_lines) == []
    assert alice.get("/users/me/export", If_None_Match="*").status_code == 200


def test_everything_that_is_exported_has_a_schema() -> None:
    lists = {owned.export for owned in ownership.OWNED} - {""}
    assert set(personal_data.ExportSchema().fields) == {"user", "unionid", "personal_data"} | lists


def test_export(alice: Caller, log_lines: Any) -> None:
    order = alice.order()
    export = data_of(alice.get("/users/me/export"))
    assert set(export) >= {"user", "unionid", "personal_data", "identities", "orders"}
    assert export["personal_data"] == PERSON
    assert export["user"]["id"] == alice.id
    assert [list(identity) for identity in export["identities"]] == [["app_id", "openid", "created_at"]]
    assert export["orders"] == [order]
    assert audits(log_lines)[-1] == ("user exported", alice.id, alice.id)
