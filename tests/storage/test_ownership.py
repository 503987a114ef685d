"""Every model with a user is in the list that merging, deleting and exporting loop over."""

from typing import Any

import pytest
from sqlalchemy import String, Text

from storage.models import Base, User
from storage.ownership import OWNED

TABLES = {mapper.class_: mapper.local_table for mapper in Base.registry.mappers}


def test_every_model_with_a_user_is_in_the_list() -> None:
    users = TABLES[User].columns["id"]
    with_a_user = {
        model.__name__
        for model, table in TABLES.items()
        if "user_id" in table.columns or any(key.column is users for key in table.foreign_keys)
    }
    assert len(with_a_user) >= 3
    assert {owned.model.__name__ for owned in OWNED} == with_a_user, "add it to OWNED in storage/ownership.py"


def test_everything_is_exported_but_repeated_responses() -> None:
    assert {owned.model.__name__ for owned in OWNED if not owned.export} == {"IdempotencyKey"}


@pytest.mark.parametrize(
    "owned", [owned for owned in OWNED if owned.personal is not None], ids=lambda owned: owned.model.__name__
)
def test_rows_that_outlive_their_user_keep_no_free_text(owned: Any) -> None:
    texts = {
        column.name
        for column in TABLES[owned.model].columns
        if isinstance(column.type, String | Text) and column.nullable
    }
    assert texts == set(owned.personal)


@pytest.mark.parametrize(
    "owned", [owned for owned in OWNED if owned.personal is None], ids=lambda owned: owned.model.__name__
)
def test_rows_that_do_not_outlive_their_user_are_deleted_by_the_database(owned: Any) -> None:
    (key,) = TABLES[owned.model].columns["user_id"].foreign_keys
    assert (key.column.table.name, key.ondelete) == ("users", "CASCADE")
