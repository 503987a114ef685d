"""Reads without the ORM: rows as they are committed now, at a third of the cost of objects in a session."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar, cast

from flask import current_app
from sqlalchemy import Connection, Row, Select, bindparam, select

from storage.encrypted import Encrypted

M = TypeVar("M")


@cache
def _class_of(model: Any) -> type[Any]:
    """Make a class with a model's properties and encrypted fields, and nothing of SQLAlchemy."""
    made = type(model.__name__, (), {"__tablename__": model.__tablename__})
    for name, value in [item for base in reversed(model.__mro__) for item in vars(base).items()]:
        if isinstance(value, property | Encrypted):
            setattr(made, name, value)  # once the class is made, or an encrypted field would become another model's
    return made


@cache
def _by_id(model: Any) -> Select[Any]:
    return select(model.__table__).where(model.__table__.c.id == bindparam("id"))


def rows(statement: Select[Any], **values: Any) -> Sequence[Row[Any]]:
    """Run a SELECT on a connection of its own: outside of any transaction of this request, and of its changes."""
    with current_app.extensions["database"].connect() as connection:
        return cast(Sequence[Row[Any]], connection.execute(statement, values).all())


def load(model: Callable[..., M], found: Sequence[Row[Any]]) -> list[M]:
    """Make objects of rows that have all columns of a model's table.

    :returns: objects that have the model's columns, encrypted fields and properties as attributes, and no relationship;
        to be read, not to be changed.
    """
    made = []
    for row in found:
        snapshot = _class_of(model)()
        vars(snapshot).update(zip(row._fields, row, strict=True))
        made.append(snapshot)
    return made


def find(model: Callable[..., M], id: int, locking: Connection | None = None) -> M | None:  # noqa: A002
    """Read a row by its id, as `load` does; None if there is none.

    :param locking: a connection whose transaction locks the row.
    """
    if locking is None:
        found = rows(_by_id(model), id=id)
    else:
        found = locking.execute(_by_id(model).with_for_update(), {"id": id}).all()
    return next(iter(load(model, found)), None)
