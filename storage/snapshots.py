"""Reads without the ORM: rows as they are committed now, at a third of the cost of objects in a session."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar, cast

from flask import current_app
from sqlalchemy import Connection, Row, Select, bindparam, select

from storage.encrypted import Encrypted

M = TypeVar("M")


class Snapshot:
    """A row, with the columns, encrypted fields and properties of a model as attributes: to be read, not changed."""

    def __init__(self, row: Row[Any]) -> None:
        vars(self).update(zip(row._fields, row, strict=True))


@cache
def _class_of(model: Any) -> type[Snapshot]:
    made = type(model.__name__, (Snapshot,), {"__tablename__": model.__tablename__})
    for name, value in [item for base in reversed(model.__mro__) for item in vars(base).items()]:
        if isinstance(value, property | Encrypted):
            setattr(made, name, value)  # once the class is made, or an encrypted field would become another model's
    return made


@cache
def _by_id(model: Any, is_locked: bool) -> Select[Any]:
    found = select(model.__table__).where(model.__table__.c.id == bindparam("id"))
    return found.with_for_update() if is_locked else found


def rows(statement: Select[Any], on: Connection | None = None, **values: Any) -> Sequence[Row[Any]]:
    """Run a SELECT.

    :param on: a connection; by default one of its own, outside of any transaction of this request and of its changes.
    """
    with nullcontext(on) if on else current_app.extensions["database"].connect() as connection:
        return cast(Sequence[Row[Any]], connection.execute(statement, values).all())


def load(model: Callable[..., M], found: Sequence[Row[Any]]) -> list[M]:
    """Make snapshots of rows that have all columns of a model's table, typed as the model."""
    return [cast(M, _class_of(model)(row)) for row in found]


def find(model: Callable[..., M], id: int, on: Connection | None = None) -> M | None:  # noqa: A002
    """Read a row by its id as a snapshot; None if there is none.

    :param on: the connection whose transaction locks it; by default none does.
    """
    return next(iter(load(model, rows(_by_id(model, on is not None), on, id=id))), None)
