import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from flask import Flask
from sqlalchemy import select, text
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.schema import CreateTable

from storage import database
from storage.cipher import DecryptionError
from storage.models import PERSONAL_FIELDS, Identity, Order, OrderItem, User, UtcDateTime
from tests.harness import PERSON, having


def test_an_etag_names_table_row_and_version() -> None:
    order = Order(id=7, version=3, items=[OrderItem(id=9)])
    assert (order.etag, User(id=7, version=4).etag, order.items[0].etag) == ("orders-7-3", "users-7-4", "orders-7-3")


def test_subtotals_and_total() -> None:
    order = Order(items=[OrderItem(quantity=2, unit_price=1250), OrderItem(quantity=1, unit_price=500)])
    order.sum_up()
    assert ([item.subtotal for item in order.items], order.total) == ([2500, 500], 3000)


def test_a_change_of_an_item_is_a_new_version_of_its_order_even_if_the_total_stays(app: Flask) -> None:
    with app.app_context():
        order = Order(items=[OrderItem(sku="a", name="b", quantity=1, unit_price=1)])
        order.sum_up()
        database.session.add(order)
        database.session.commit()
        order.items[0].name = "c"
        order.sum_up()
        database.session.commit()
        assert (order.version, order.total) == (2, 1)


def test_the_second_writer_of_a_version_fails(app: Flask) -> None:
    with app.app_context():
        mine = Order(total=0)
        database.session.add(mine)
        database.session.commit()
        with app.app_context():
            database.session.get_one(Order, mine.id).remark = "theirs"
            database.session.commit()
        mine.remark = "mine"
        with pytest.raises(StaleDataError):
            database.session.commit()
        database.session.rollback()
        assert database.session.scalar(select(Order.remark).where(Order.id == mine.id)) == "theirs"


def test_a_time_is_stored_in_utc_with_microseconds(app: Flask) -> None:
    moment = datetime(2026, 1, 1, 7, 59, 59, 999999, timezone(timedelta(hours=8)))
    with app.app_context():
        stored = Order(total=0, created_at=moment)
        database.session.add(stored)
        database.session.commit()
        database.session.refresh(stored)
        assert (stored.created_at, stored.created_at.tzinfo) == (moment, UTC)
        naive = database.session.scalar(text("SELECT created_at FROM orders WHERE id = :id"), {"id": stored.id})
        assert str(naive) == "2025-12-31 23:59:59.999999"
        assert UtcDateTime().process_bind_param(None, None) is None  # type: ignore[arg-type]


def test_a_new_row_was_last_changed_when_it_was_created(app: Flask) -> None:
    with app.app_context():
        database.insert_unless_exists(User, app_id="wx1", openid="o-statement")
        order = Order(items=[OrderItem(sku="a", name="b", quantity=1, unit_price=1)])
        order.sum_up()
        user = User(app_id="wx1", openid="o-object")
        database.session.add_all([order, user])
        database.session.commit()
        database.session.expire_all()
        inserted = database.session.scalars(select(User).where(User.openid == "o-statement")).one()
        assert [row.updated_at - row.created_at for row in (order, user, inserted)] == [timedelta(0)] * 3
        order.sum_up()
        assert order.updated_at > order.created_at


def test_the_id_of_a_deleted_user_is_not_reused(app: Flask) -> None:
    with app.app_context():
        ids = []
        for _ in range(2):
            user = User(app_id="wx1", openid="o-leaves")
            database.session.add(user)
            database.session.commit()
            ids.append(user.id)
            database.session.delete(user)
            database.session.commit()
        assert ids[1] > ids[0]


def test_mysql_compares_identifiers_by_case() -> None:
    dialect = database.engine_for("mysql://localhost/kuaishang").dialect
    for model, names in ((User, ["app_id", "openid", "unionid"]), (Identity, ["app_id", "openid"])):
        created = str(CreateTable(model.__table__).compile(dialect=dialect))
        assert re.findall(r"(\w+) VARCHAR\(\d+\) COLLATE utf8mb4_bin", created) == names


def test_the_personal_fields_are_these() -> None:
    assert tuple(PERSON) == PERSONAL_FIELDS


@pytest.mark.parametrize("name", PERSONAL_FIELDS)
def test_a_personal_field_can_be_set_before_the_row_is_stored_and_cleared(app: Flask, name: str) -> None:
    with app.app_context():
        user = User(app_id="wx1", openid=f"o-new-{name}", **{name: PERSON[name]})
        assert [getattr(user, field) for field in PERSONAL_FIELDS if field != name] == [None] * 4
        database.session.add(user)
        database.session.commit()
        database.session.refresh(user)
        assert getattr(user, name) == PERSON[name]
        setattr(user, name, None)
        assert [getattr(user, name + part) for part in ("", "_encrypted", "_index")] == [None] * 3


@pytest.mark.parametrize("name", [*PERSONAL_FIELDS, "authorization"])
def test_an_encrypted_field_decrypts_only_in_its_row_and_column(app: Flask, name: str) -> None:
    model = Identity if name == "authorization" else User
    with app.app_context():
        row, other_row, other_app = (
            model(app_id=app_id, openid=o) for app_id, o in (("1", "a"), ("1", "b"), ("2", "a"))
        )
        setattr(row, name, "in the clear")
        sealed = getattr(row, f"{name}_encrypted")
        assert not any("in the clear" in str(value) for value in vars(row).values())
        elsewhere = [(other_row, name), (other_app, name)]
        elsewhere += [(row, field) for field in PERSONAL_FIELDS if field != name and model is User]
        for target, field in elsewhere:
            setattr(target, f"{field}_encrypted", sealed)
            with pytest.raises(DecryptionError):
                getattr(target, field)
        assert getattr(row, name) == "in the clear"


@pytest.mark.parametrize("name", PERSONAL_FIELDS)
def test_users_are_found_by_the_exact_value_of_one_column(app: Flask, name: str) -> None:
    value = f"{PERSON[name]} of the search"
    with app.app_context():
        others = {field: value for field in PERSONAL_FIELDS if field != name} | {name: f"{value} "}
        users = [
            User(app_id="wx1", openid=f"o-{name}-{n}", **row) for n, row in enumerate([{name: value}] * 2 + [others])
        ]
        database.session.add_all(users)
        database.session.commit()
        found = database.session.scalars(select(User).where(having(name, value)))
        assert set(found) == set(users[:2])


def test_a_row_without_app_id_and_openid_encrypts_nothing(app: Flask) -> None:
    with app.app_context(), pytest.raises(ValueError, match="must be set first"):
        User(phone="13812345678", app_id="wx1", openid="o-late")


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("phone", "0" * 155),
        ("real_name", "𠮷" * 64),
        ("id_card", "0" * 155),
        ("email", "x" * 347),
        ("bank_card", "0" * 155),
    ],
)
def test_the_longest_values_fit_their_columns(app: Flask, name: str, longest: str) -> None:
    with app.app_context():
        user = User(app_id="wx1", openid="o-long", **{name: longest})
    for column in (f"{name}_encrypted", f"{name}_index"):
        assert len(getattr(user, column)) <= User.__table__.c[column].type.length
