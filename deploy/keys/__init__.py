"""Moves encrypted data in the database to the first of ENCRYPTION_KEYS, while the service runs.

In the tree of a release, with the service's settings: `FLASK_APP=deploy.keys flask keys rotate`, or `… status`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import AppGroup, with_appcontext
from sqlalchemy import ColumnElement, Row, and_, case, func, or_, select, true, update

import service
from storage import database
from storage.cipher import DecryptionError, cipher
from storage.models import Base, BlockedIdentity, Encrypted, encrypted_fields

BATCH = 100
"""Values per transaction, which locks their rows."""
FIELDS = [field for model in Base.__subclasses__() for field in encrypted_fields(model)]
"""All encrypted fields of the database."""


def create_app() -> Flask:
    """Make the service with this command."""
    app = service.create_app()
    app.cli.add_command(keys)
    return app


@click.group(cls=AppGroup)
@with_appcontext
def keys() -> None:
    """The keys that encrypt personal data."""
    # Counting a large table takes longer than a statement of the service may.
    current_app.extensions["database"] = database.engine_for(current_app.config["DATABASE_URL"])


@keys.command()
def status() -> None:
    """Count the values under the first of ENCRYPTION_KEYS, and the others.

    The exit status is 0 if none is left under another key, and 1 otherwise.
    """
    left = 0
    for field in FIELDS:
        counts = func.count(field.model.__table__.c[field.columns[0]]), func.count(case((_is_behind(field), 1)))
        total, behind = database.session.execute(select(*counts)).one()
        click.echo(f"{field.place}: {total - behind} under the first key, {behind} not")
        left += behind
    under_others = ~BlockedIdentity.fingerprint.startswith(f"{cipher.key_id}.")
    if blocks := database.session.scalar(select(func.count()).where(under_others)):
        click.echo(f"{blocks} kept blocks end with their key, as a hash cannot move. Keep it, or lift them.", err=True)
    if left:
        click.echo("The other keys are still needed. Rotate until nothing is left.", err=True)
    if left or blocks:
        raise click.exceptions.Exit(1)
    click.echo("All is under the first key.")


@keys.command()
def rotate() -> None:
    """Encrypt values under other keys with the first of ENCRYPTION_KEYS.

    Append the new key and reload every instance; move it to the front and reload again; run this; when the exit
    status is 0, remove the old key. It can run beside the service, and be stopped and run again at any time. A value
    that no key decrypts is named and left as it is.

    It does not touch Redis, where encrypted values expire by themselves: keep the old key for another
    SESSION_ABSOLUTE_LIFETIME, or some users must log in again before data encrypted by WeChat can be read.
    """
    for field in FIELDS:
        after: ColumnElement[bool] = true()
        while rows := database.in_transaction(partial(_rotate_batch, field, after)):
            after = database.follows(field.model.__table__, rows[-1])
    click.get_current_context().invoke(status)


def _rotate_batch(field: Encrypted, after: ColumnElement[bool]) -> Sequence[Row[Any]]:
    """Encrypt the next values with the first key; `updated_at` and the version stay.

    :returns: the rows as they were.
    """
    table: Any = field.model.__table__
    batch = select(table).where(_is_behind(field), after).order_by(*table.primary_key).limit(BATCH).with_for_update()
    rows = database.session.execute(batch).all()
    kept = {column.name: column for column in table.c if column.onupdate is not None}
    for row in rows:
        try:
            sealed = field.seal(row, field.open(row))
        except DecryptionError:
            name = ", ".join(f"{column.name} {getattr(row, column.name)}" for column in table.primary_key)
            click.echo(f"{field.place} of {name}: no key decrypts it; left as it is", err=True)
        else:
            same = [column == getattr(row, column.name) for column in table.primary_key]
            database.session.execute(update(table).where(*same).values(kept | sealed))
    return rows


def _is_behind(field: Encrypted) -> ColumnElement[bool]:
    columns = [field.model.__table__.c[name] for name in field.columns]
    prefix = f"{cipher.key_id}."
    # A row from before there was an index has none.
    return and_(columns[0].is_not(None), or_(*[~func.coalesce(column, "").startswith(prefix) for column in columns]))
