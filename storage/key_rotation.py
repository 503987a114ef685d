"""`flask keys`: moves encrypted data in the database to the first of ENCRYPTION_KEYS, while the service runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from flask import current_app
from flask.cli import AppGroup
from sqlalchemy import ColumnElement, Connection, Row, Table, and_, bindparam, func, or_, select, update
from sqlalchemy.exc import DBAPIError

from storage.cipher import DecryptionError
from storage.database import engine_for, is_lost_race
from storage.encrypted import Encrypted, encrypted_fields
from storage.models import Base, BlockedIdentity

keys = AppGroup("keys", help="The keys that encrypt personal data.")

FIELDS = [field for model in Base.__subclasses__() for field in encrypted_fields(model)]
"""All encrypted fields of the database."""


@keys.command()
def status() -> None:
    """Count the values under the first of ENCRYPTION_KEYS, and the others.

    The exit status is 0 if none is left under another key, and 1 otherwise.
    """
    with _connection() as connection:
        _report(connection)


@keys.command()
@click.option(
    "--batch-size",
    type=click.IntRange(1, 10_000),
    default=500,
    show_default=True,
    help="Values per transaction, which locks their rows.",
)
def rotate(batch_size: int) -> None:
    """Encrypt values under other keys with the first of ENCRYPTION_KEYS.

    Append the new key and restart every instance; move it to the front and restart again; run this; when the exit
    status is 0, remove the old key. It can run beside the service, and be stopped and run again at any time. A value
    that no key decrypts is named and left as it is.

    It does not touch Redis, where encrypted values expire by themselves: keep the old key for another
    SESSION_ABSOLUTE_LIFETIME, or some users must log in again before data encrypted by WeChat can be read.
    """
    with _connection() as connection:
        for field in FIELDS:
            _rotate(connection, field, batch_size)
        _report(connection)


@contextmanager
def _connection() -> Iterator[Connection]:
    # Not the service's engine: counting a large table takes longer than a request may.
    engine = engine_for(current_app.config["DATABASE_URL"])
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _report(connection: Connection) -> None:
    left = 0
    for field in FIELDS:
        there = _count(connection, field.model.__table__.c[field.columns[0]].is_not(None))
        behind = _count(connection, _is_behind(field))
        click.echo(f"{field.place}: {there - behind} under the first key, {behind} not")
        left += behind
    fingerprint = BlockedIdentity.__table__.c.fingerprint
    blocks = _count(connection, ~fingerprint.startswith(f"{current_app.extensions['cipher'].key_id}."))
    if blocks:
        click.echo(f"{blocks} kept blocks end with their key, as a hash cannot move. Keep it, or lift them.", err=True)
    if left:
        click.echo("The other keys are still needed. Run `flask keys rotate` until nothing is left.", err=True)
    if left or blocks:
        raise click.exceptions.Exit(1)
    click.echo("All is under the first key.")


def _rotate(connection: Connection, field: Encrypted, batch_size: int) -> None:
    table: Any = field.model.__table__
    behind = _is_behind(field)
    after: list[ColumnElement[bool]] = []
    with click.progressbar(length=_count(connection, behind), label=field.place) as bar:
        while True:
            with connection.begin():
                batch = select(table).where(behind, *after).order_by(*table.primary_key).limit(batch_size)
                rows = connection.execute(batch).all()
            if not rows:
                return
            changes = []
            for row in rows:
                try:
                    changes.append(_change(field, row))
                except DecryptionError:
                    name = ", ".join(f"{column.name} {getattr(row, column.name)}" for column in table.primary_key)
                    click.echo(f"{field.place} of {name}: no key decrypts it; left as it is", err=True)
            _store(connection, field, changes)
            bar.update(len(rows))
            after = [_follows(table, rows[-1])]


def _change(field: Encrypted, row: Row[Any]) -> dict[str, Any]:
    new = field.seal(row, field.open(row))
    old = [*(column.name for column in field.model.__table__.primary_key), field.columns[0]]
    return {f"old_{name}": getattr(row, name) for name in old} | {f"new_{name}": value for name, value in new.items()}


def _store(connection: Connection, field: Encrypted, changes: list[dict[str, Any]]) -> None:
    """Update the values that have not changed since they were read, and nothing else."""
    if not changes:
        return
    table: Any = field.model.__table__
    unchanged = [
        column == bindparam(f"old_{column.name}") for column in (*table.primary_key, table.c[field.columns[0]])
    ]
    values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in field.columns}
    values |= {column.name: column for column in table.c if column.onupdate is not None}
    try:
        with connection.begin():
            connection.execute(update(table).where(*unchanged).values(values), changes)
    except DBAPIError as error:
        if not is_lost_race(error):  # these rows are left, and the report says so
            raise


def _is_behind(field: Encrypted) -> ColumnElement[bool]:
    columns = [field.model.__table__.c[name] for name in field.columns]
    prefix = f"{current_app.extensions['cipher'].key_id}."
    # A row from before there was an index has none.
    return and_(
        columns[0].is_not(None), or_(*[or_(column.is_(None), ~column.startswith(prefix)) for column in columns])
    )


def _follows(table: Table, row: Row[Any]) -> ColumnElement[bool]:
    """Return the condition that a row follows this one by primary key; spelt out, as MySQL uses no index for tuples."""
    key = list(table.primary_key)
    same = [column == getattr(row, column.name) for column in key]
    return or_(*[and_(*same[:place], column > getattr(row, column.name)) for place, column in enumerate(key)])


def _count(connection: Connection, condition: ColumnElement[bool]) -> int:
    with connection.begin():
        return connection.scalar(select(func.count()).where(condition)) or 0
