"""The SQL database: one engine per process, one session per request."""

import errno
import logging
import os
import random
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

from flask import Flask, current_app, g
from sqlalchemy import ColumnElement, Engine, and_, create_engine, event, exc, false, make_url, or_, select
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import PoolProxiedConnection, QueuePool
from werkzeug.local import LocalProxy

from concurrency import seconds_left
from errors import ApiError, Code
from storage import failures, sessions, snapshots
from storage.models import Base, User
from telemetry import metrics

STATEMENT_SECONDS = 3
TRIES = 5
SQLITE_FREE_BYTES = 1_000_000
"""What must be free for SQLite to count as ready."""
T = TypeVar("T")
_SCHEMA_PROBE = select(*(select(table).where(false()).exists() for table in Base.metadata.sorted_tables))
_WRITE_PROBE = Base.metadata.sorted_tables[0].delete().where(false())
# Greedy: a value may contain quotes.
_QUOTED = re.compile(r"'.*'( for (?:key|column) '[^']*'(?: at row \d+)?)\Z|'.*'", re.DOTALL)
_QUOTES_NAMES_ALONE = {1048, 1054, 1146, 1264, 1364, 1406}
_NAMES = {name for table in Base.metadata.sorted_tables for name in (table.name, *table.columns.keys())}


logging.getLogger(f"{__name__}.Pool").setLevel(logging.WARNING)  # as those of SQLAlchemy's own pools


class Pool(QueuePool):
    """Counts for how long a connection is waited for while all are in use."""

    def connect(self) -> PoolProxiedConnection:
        is_full, began = self.checkedout() >= self.size(), time.monotonic()
        try:
            return super().connect()
        finally:
            if is_full:
                metrics.POOL_WAIT_SECONDS.labels("database").inc(time.monotonic() - began)


def engine_for(url: str, pool_size: int = 1, seconds: int | None = None) -> Engine:
    """Connect lazily to a database.

    :param url: SQLAlchemy's form; mysql:// and mariadb:// are spoken by PyMySQL.
    :param pool_size: the maximum number of connections.
    :param seconds: how long a statement may take; unlimited by default, as migrations need.
    """
    address = make_url(url)
    options: dict[str, Any] = {}
    if address.get_backend_name() != "sqlite":
        # PyMySQL is the only driver installed, and MariaDB speaks MySQL's protocol.
        address = address.set(drivername="mysql+pymysql")
        options["connect_args"] = {"connect_timeout": 1, "read_timeout": seconds, "write_timeout": seconds}
        # Whatever URL and server say: no character is lost, no value is cut off, every table has transactions.
        setup = "SET SESSION sql_mode = 'TRADITIONAL', default_storage_engine = 'InnoDB'"
        options["connect_args"] |= {"charset": "utf8mb4", "init_command": setup}
        # A read under a lock must see the current row, not a snapshot from the first read of the transaction.
        options["isolation_level"] = "READ COMMITTED"
        options["pool_pre_ping"] = True  # so that a server restart causes no error, for a round trip
        # A name that leads to another server now is followed within a minute; a new connection takes some milliseconds.
        options["pool_recycle"] = 60
    # hide_parameters: error messages are logged, and parameters are personal data.
    engine = create_engine(
        address, poolclass=Pool, pool_size=pool_size, max_overflow=0, pool_timeout=1, hide_parameters=True, **options
    )
    event.listen(engine, "handle_error", _handle_error)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", partial(_prepare_sqlite, wait=seconds is None))
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object, *, wait: bool) -> None:
    connection.execute("PRAGMA busy_timeout = 3000")
    connection.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not block each other
    connection.execute("PRAGMA synchronous = NORMAL")  # safe with the write-ahead log, and saves a sync per commit
    connection.execute("PRAGMA foreign_keys = ON")
    if not wait:  # SQLite's own wait would hold all requests of the process
        connection.execute("PRAGMA busy_timeout = 0")


def _handle_error(context: ExceptionContext) -> None:
    """Replace all connections of the pool after a failover that left them open.

    Remove the parameters that the server quotes in an error, as in `Duplicate entry '…' for key 'name'`.
    """
    context.is_disconnect |= bool(failures.codes(context.original_exception) & failures.FAILOVERS)
    if context.statement is None:  # a failed connect quotes only the host
        return
    driver, ours = context.original_exception, context.sqlalchemy_exception
    message = str(driver)
    hide = _hide_other_names if failures.codes(driver) & _QUOTES_NAMES_ALONE else partial(_QUOTED.sub, r"'…'\1")
    driver.args = tuple(hide(part) if isinstance(part, str) else part for part in driver.args)
    if ours is not None:
        ours.args = (ours.args[0].replace(message, str(driver)),)


def _hide_other_names(text: str) -> str:
    """Keep the names of our own tables, columns and clauses: `Unknown column 'users.phone' in 'field list'`."""
    return re.sub(r"(?<! in )'(?:[^']*\.)?([^']*)'", lambda name: name[0] if name[1] in _NAMES else "'…'", text)


def init_app(app: Flask) -> None:
    engine = app.extensions["database"] = engine_for(
        app.config["DATABASE_URL"], pool_size=app.config["DATABASE_CONNECTIONS"], seconds=STATEMENT_SECONDS
    )
    metrics.SAMPLED[metrics.POOL_IN_USE.labels("database")] = lambda: engine.pool.checkedout()  # type: ignore[attr-defined]
    app.extensions["sqlite_writers"] = threading.Lock()
    app.teardown_appcontext(_close)


def _session() -> Session:
    if "database_session" not in g:
        g.database_session = Session(current_app.extensions["database"], expire_on_commit=False)
    return cast(Session, g.database_session)


def _close(error: BaseException | None) -> None:
    if "database_session" in g:
        try:
            g.pop("database_session").close()
        except SQLAlchemyError as lost:  # the rollback failed; the response is complete all the same
            current_app.logger.warning("database connection lost: %s", getattr(lost, "orig", lost))


session = cast(Session, LocalProxy(_session))
"""The session of the current request, closed with it in any case; uncommitted changes are rolled back."""


def ping() -> None:
    """Run a query that returns no rows but names every table and column, and a statement that would write.

    :raises sqlalchemy.exc.SQLAlchemyError: if the database does not respond, lacks a migration or takes no writes.
    :raises OSError: if the file of SQLite takes no writes.
    """
    session.execute(_SCHEMA_PROBE)
    address = session.get_bind().engine.url
    if address.get_backend_name() != "sqlite":
        in_transaction(lambda: session.execute(_WRITE_PROBE))
    elif not os.access(str(address.database), os.W_OK):  # a write would wait for the only writer
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    elif shutil.disk_usage(str(address.database)).free < SQLITE_FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_lost_race(error: DBAPIError | StaleDataError) -> bool:
    """Whether a transaction can be retried: it failed because of a concurrent one, or where nothing can be written."""
    return isinstance(error, StaleDataError) or bool(failures.codes(error.orig) & failures.LOST)


def in_transaction(work: Callable[[], T]) -> T:
    """Run some work and commit; up to TRIES times in all if it lost a race, or met a server that takes no writes.

    The row of the user who is signed in is locked, and their session must not have ended: what the work writes for them
    is there before a deletion, a merge or a cancellation looks for it, or is not written.

    :param work: does nothing but database work, and loads the rows it needs itself. It locks rows whose version it does
        not check: `with_for_update`.
    :returns: what the last run of `work` returned.
    :raises ApiError: UNAUTHORIZED if the user who was signed in has been deleted, or the session has ended.
    :raises redis.exceptions.RedisError: if Redis is away.
    :raises sqlalchemy.orm.exc.StaleDataError: if the last try lost against a newer version of a row.
    :raises sqlalchemy.exc.DBAPIError: if it failed otherwise.
    """
    for tries_left in reversed(range(TRIES)):
        session.rollback()  # rows read before may be stale
        g.after_commit = []
        try:
            with _transaction():
                if "user_id" in g:
                    g.user = snapshots.find(User, g.user_id, session.connection())
                    if g.user is None or sessions.is_revoked():
                        raise ApiError(Code.UNAUTHORIZED)
                result = work()
        except (DBAPIError, StaleDataError) as error:
            if not tries_left or not is_lost_race(error):
                raise
        else:
            for function in g.pop("after_commit"):
                function()
            return result
        finally:
            g.pop("user", None)
    raise AssertionError("unreachable")


@contextmanager
def _transaction() -> Iterator[None]:
    """Begin and commit. Writers of SQLite wait for each other before, instead of failing when they write after a read.

    Those of one process queue up for a lock; whether another process writes is asked again and again.
    """
    if session.get_bind().dialect.name != "sqlite":
        with session.begin():
            yield
        return
    queue: threading.Lock = current_app.extensions["sqlite_writers"]
    if not queue.acquire(timeout=seconds_left(STATEMENT_SECONDS)):
        raise exc.TimeoutError("another transaction of this process takes too long")
    try:
        with session.begin():
            _begin_immediate()
            yield
    finally:
        queue.release()


def _begin_immediate() -> None:
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
