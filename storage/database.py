"""The SQL database: one engine per process, one session per request."""

import errno
import logging
import os
import random
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from typing import Any, TypeVar, cast

from flask import Flask, current_app, g
from sqlalchemy import ColumnElement, Engine, and_, bindparam, create_engine, event, false, make_url, or_, select
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.engine import Connection, ExceptionContext, Row
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import PoolProxiedConnection, QueuePool
from sqlalchemy.sql import Select
from werkzeug.local import LocalProxy

from concurrency import SharedReads, seconds_left
from errors import ApiError, Code
from storage import failures
from storage.models import Base, Encrypted, User
from telemetry import metrics

STATEMENT_SECONDS = 3
TRIES = 5
SQLITE_FREE_BYTES = 1_000_000
"""What must be free for SQLite to count as ready."""
T = TypeVar("T")
_SCHEMA_PROBE = select(*(select(table).where(false()).exists() for table in Base.metadata.sorted_tables))
_LOCKED_USER = select(User.__table__).where(User.id == bindparam("id")).with_for_update()
# Greedy: a value may contain quotes. The last one of a duplicate is the name of a key.
_QUOTED = re.compile(r"'.*'( for key '[^']*'\Z)|'.*'", re.DOTALL)


logging.getLogger(f"{__name__}.Pool").setLevel(logging.WARNING)  # as those of SQLAlchemy's own pools


class Pool(QueuePool):
    """Measures for how long a connection is waited for while all are in use."""

    def connect(self) -> PoolProxiedConnection:
        with metrics.POOL_WAIT_SECONDS.labels("database").time() if self.checkedout() >= self.size() else nullcontext():
            return super().connect()


def engine_for(url: str, pool_size: int = 1, seconds: int | None = None) -> Engine:
    """Connect lazily to a database.

    :param url: SQLAlchemy's form; mysql:// and mariadb:// are spoken by PyMySQL.
    :param pool_size: the maximum number of connections.
    :param seconds: how long a statement may take; unlimited by default, as migrations need.
    """
    address = make_url(url)
    # hide_parameters: error messages are logged, and parameters are personal data.
    options: dict[str, Any] = {"poolclass": Pool, "max_overflow": 0, "pool_timeout": 1, "hide_parameters": True}
    if address.get_backend_name() != "sqlite":
        # PyMySQL is the only driver installed, and MariaDB speaks MySQL's protocol.
        address = address.set(drivername="mysql+pymysql")
        options["connect_args"] = {"connect_timeout": 1, "read_timeout": seconds, "write_timeout": seconds}
        # Whatever URL and server say: no character is lost, no value is cut off, every table has transactions. And a
        # migration waits a second for a table that somebody uses, as everybody else then waits behind it.
        setup = f"SET sql_mode = 'TRADITIONAL', default_storage_engine = 'InnoDB', lock_wait_timeout = {seconds or 1}"
        options["connect_args"] |= {"charset": "utf8mb4", "init_command": setup}
        # A read under a lock must see the current row, not a snapshot from the first read of the transaction. For a
        # round trip, a server's restart causes no error. A name that leads to another server now is followed within a
        # minute; a new connection takes some milliseconds.
        options |= {"isolation_level": "READ COMMITTED", "pool_pre_ping": True, "pool_recycle": 60}
    engine = create_engine(address, pool_size=pool_size, **options)
    event.listen(engine, "handle_error", _handle_error)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", partial(_prepare_sqlite, wait=seconds is None))
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object, *, wait: bool) -> None:
    connection.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not block each other
    connection.execute("PRAGMA synchronous = NORMAL")  # safe with the write-ahead log, and saves a sync per commit
    connection.execute("PRAGMA foreign_keys = ON")
    if not wait:  # SQLite's own wait would hold all requests of the process
        connection.execute("PRAGMA busy_timeout = 0")


def _handle_error(context: ExceptionContext) -> None:
    """Replace all connections of the pool after a failover that left them open.

    Remove what the server quotes in an error, as in `Duplicate entry '…' for key 'name'`: it may be a parameter.
    """
    driver, ours = context.original_exception, context.sqlalchemy_exception
    context.is_disconnect |= bool(failures.codes(driver) & failures.FAILOVERS)
    if ours is None or context.statement is None:  # a failed connect quotes only the host
        return
    message = str(driver)
    driver.args = tuple(_QUOTED.sub(r"'…'\1", part) if isinstance(part, str) else part for part in driver.args)
    ours.args = (ours.args[0].replace(message, str(driver)),)


def init_app(app: Flask) -> None:
    url, connections = app.config["DATABASE_URL"], app.config["DATABASE_CONNECTIONS"]
    engine = app.extensions["database"] = engine_for(url, connections, STATEMENT_SECONDS)
    metrics.SAMPLED[metrics.POOL_IN_USE.labels("database")] = lambda: engine.pool.checkedout()  # type: ignore[attr-defined]
    app.teardown_appcontext(_close)


def _session() -> Session:
    if "database_session" not in g:
        g.database_session = Session(current_app.extensions["database"], expire_on_commit=False)
    return cast(Session, g.database_session)


def _close(error: BaseException | None) -> None:
    if "database_session" in g:
        with suppress(SQLAlchemyError):  # the rollback failed; the response is complete all the same
            g.pop("database_session").close()


session = cast(Session, LocalProxy(_session))
"""The session of the current request, closed with it in any case; uncommitted changes are rolled back."""


class Snapshot:
    """A row without the ORM, at a third of the cost of an object in a session: to be read, not changed.

    It has the columns, encrypted fields and properties of a model as attributes.
    """

    def __init__(self, row: Row[Any]) -> None:
        vars(self).update(zip(row._fields, row, strict=True))


@cache
def _class_of(model: Any) -> type[Snapshot]:
    made = type(model.__name__, (Snapshot,), {"__tablename__": model.__tablename__})
    for name, value in [item for base in reversed(model.__mro__) for item in vars(base).items()]:
        if isinstance(value, property | Encrypted):
            setattr(made, name, value)  # once the class is made, or an encrypted field would become another model's
    return made


def rows(statement: Select[Any], on: Connection | None = None, **values: Any) -> Sequence[Row[Any]]:
    """Run a SELECT.

    :param on: a connection; by default one of its own, outside of any transaction of this request and of its changes.
    """
    with nullcontext(on) if on else current_app.extensions["database"].connect() as connection:
        return cast(Sequence[Row[Any]], connection.execute(statement, values).all())


def load(model: Callable[..., T], found: Sequence[Row[Any]]) -> list[T]:
    """Make snapshots of rows that have all columns of a model's table, typed as the model."""
    return [cast(T, _class_of(model)(row)) for row in found]


@cache
def _shared(model: Any) -> SharedReads:
    by_ids = select(model.__table__).where(model.__table__.c.id.in_(bindparam("ids", expanding=True)))
    return SharedReads(lambda ids: {row.id: row for row in load(model, rows(by_ids, ids=ids))})


def find(model: Callable[..., T], id: int) -> T | None:  # noqa: A002
    """Read a row by its id as a snapshot; None if there is none. All that are read at this moment are read at once."""
    return cast(T | None, _shared(model).get(id))


def ping() -> None:
    """Run a query that returns no rows but names every table and column, and a statement that would write.

    :raises sqlalchemy.exc.SQLAlchemyError: if the database does not respond, lacks a migration or takes no writes.
    :raises OSError: if the file of SQLite takes no writes.
    """
    session.execute(_SCHEMA_PROBE)
    address = session.get_bind().engine.url
    if address.get_backend_name() != "sqlite":
        in_transaction(lambda: session.execute(Base.metadata.sorted_tables[0].delete().where(false())))
    elif not os.access(str(address.database), os.W_OK):  # a write would wait for the only writer
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    elif shutil.disk_usage(str(address.database)).free < SQLITE_FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_transaction(work: Callable[[], T], tries: int = TRIES, is_keyed: bool = False) -> T:
    """Run some work and commit; in so many tries if it loses a race, or meets a server that goes or takes no writes.

    The row of the user who is signed in is locked: what the work writes for them is there before a deletion, a merge, a
    cancellation or a block looks for it, or is not written.

    :param work: does nothing but database work, and loads the rows it needs itself. It locks rows whose version it does
        not check: `with_for_update`.
    :param is_keyed: whether a second run finds what the first one committed, and does nothing. Else a COMMIT without an
        answer, which may have succeeded, is not repeated.
    :returns: what the last run of `work` returned.
    :raises ApiError: UNAUTHORIZED if the user who was signed in has been deleted or blocked.
    :raises sqlalchemy.orm.exc.StaleDataError: if the last try lost against a newer version of a row.
    :raises sqlalchemy.exc.DBAPIError: if it failed otherwise.
    """
    session.rollback()  # rows read before may be stale
    g.after_commit = []
    try:
        with session.begin():
            if session.get_bind().dialect.name == "sqlite":
                _begin_immediate()
            if "user_id" in g:
                g.user = next(iter(load(User, rows(_LOCKED_USER, session.connection(), id=g.user_id))), None)
                if g.user is None or g.user.blocked:
                    raise ApiError(Code.UNAUTHORIZED)
            result = work()
    except (DBAPIError, StaleDataError) as error:
        # Of a COMMIT, and of a connection that failed, there is no statement.
        is_safe = is_keyed or getattr(error, "statement", None) is not None
        if tries == 1 or not failures.may_repeat(getattr(error, "orig", error), is_safe):
            raise
        return in_transaction(work, tries - 1, is_keyed)
    finally:
        g.pop("user", None)
    for function in g.pop("after_commit"):
        function()
    return result


def _begin_immediate() -> None:
    """Become the only writer of SQLite; one that began with a read could fail when it writes.

    Ask again and again whether another one writes: SQLite's own wait would hold all requests of this process.
    """
    ends = time.monotonic() + seconds_left(STATEMENT_SECONDS)
    while True:
        try:
            session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            return
        except OperationalError as error:
            if "SQLITE_BUSY" not in failures.codes(error.orig) or time.monotonic() > ends:
                raise
        time.sleep(random.uniform(0.001, 0.02))  # noqa: S311


def lock(model: type[T], id: int) -> T | None:  # noqa: A002
    """Load a row by its id, locked until the transaction ends."""
    return session.get(model, id, with_for_update=True)


def after_commit(function: Callable[[], object]) -> None:
    """Call a function after the current `in_transaction` has committed, and not if it fails."""
    g.after_commit.append(function)


def follows(table: Any, row: Any) -> ColumnElement[bool]:
    """Return the condition that a row follows this one by primary key; spelt out, as MySQL uses no index for tuples.

    :param row: of the table, or an object of its model.
    """
    key = list(table.primary_key)
    same = [column == getattr(row, column.name) for column in key]
    return or_(*[and_(*same[:place], column > getattr(row, column.name)) for place, column in enumerate(key)])


def insert_unless_exists(model: type[DeclarativeBase], **values: Any) -> None:
    """Insert a row in one statement; if a row with one of its unique keys exists, leave that as it is.

    Leaves the commit to the caller. Columns without a value get their defaults.
    """
    if session.get_bind().dialect.name == "sqlite":
        session.execute(sqlite.insert(model).values(**values).on_conflict_do_nothing())
    else:
        unchanged = {name: getattr(model, name) for name in values}
        session.execute(mysql.insert(model).values(**values).on_duplicate_key_update(unchanged))
