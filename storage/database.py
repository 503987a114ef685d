"""The SQL database: one engine a process, one session a request."""

import re
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar, cast

from flask import Flask, current_app, g
from sqlalchemy import Engine, Executable, create_engine, event, false, make_url, select
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.local import LocalProxy

from storage.models import Base

STATEMENT_SECONDS = 3
TRIES = 5
T = TypeVar("T")
_RACE_ERRORS = {
    1062,  # somebody else made the same row meanwhile
    1213,  # deadlock: somebody has to begin again
    1020,  # MariaDB's snapshot isolation: the record has changed since last read
    "SQLITE_CONSTRAINT_UNIQUE",
    "SQLITE_CONSTRAINT_PRIMARYKEY",
}
_LACK_ERRORS = {
    1146,  # no such table
    1054,  # no such column
    "SQLITE_ERROR",  # the statement is wrong, which it is for no other reason
}
_NOTHING_OF_EACH_TABLE = select(*(select(table).where(false()).exists() for table in Base.metadata.sorted_tables))
_QUOTED = re.compile(r"'.*'( for key '[^']*')\Z|'.*'", re.DOTALL)  # as far as it goes: a value may hold quotes itself


def engine_for(url: str, pool_size: int = 1, seconds: int | None = None) -> Engine:
    """Connect lazily to a database.

    :param url: SQLAlchemy's form; mysql:// and mariadb:// are spoken by PyMySQL.
    :param pool_size: connections at the most.
    :param seconds: how long a statement may keep its caller waiting; for ever by default, as migrations need.
    """
    address = make_url(url)
    options: dict[str, Any] = {}
    if address.get_backend_name() != "sqlite":
        # PyMySQL is the one driver that is installed, and MariaDB speaks MySQL.
        address = address.set(drivername="mysql+pymysql")
        options["connect_args"] = {"connect_timeout": 1, "read_timeout": seconds, "write_timeout": seconds}
        # What is read under a lock must be what is there now, not what was there when the request first read something.
        options["isolation_level"] = "READ COMMITTED"
        options["pool_pre_ping"] = True  # a server that was restarted costs nobody an error
    engine = create_engine(
        address,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=1,
        hide_parameters=True,  # error messages are logged, and parameters are personal data
        **options,
    )
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    else:
        event.listen(engine, "handle_error", _forget_values)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout = 3000")
    connection.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not block each other
    connection.execute("PRAGMA synchronous = NORMAL")  # safe with the write-ahead log, and spares a sync a commit
    connection.execute("PRAGMA foreign_keys = ON")


def _forget_values(context: ExceptionContext) -> None:
    """Take out of an error what the server quotes of the parameters, as in `Duplicate entry '…' for key 'name'`."""
    if context.statement is None:  # it could not connect, and quotes the host
        return
    driver, ours = context.original_exception, context.sqlalchemy_exception
    said = str(driver)
    driver.args = tuple(_QUOTED.sub(r"'…'\1", part) if isinstance(part, str) else part for part in driver.args)
    if ours is not None:
        ours.args = (ours.args[0].replace(said, str(driver)),)


def init_app(app: Flask) -> None:
    app.extensions["database"] = engine_for(
        app.config["DATABASE_URL"], pool_size=app.config["WEB_THREADS"], seconds=STATEMENT_SECONDS
    )
    app.teardown_appcontext(_close)


def _session() -> Session:
    if "database_session" not in g:
        g.database_session = Session(current_app.extensions["database"], expire_on_commit=False)
    return cast(Session, g.database_session)


def _close(error: BaseException | None) -> None:
    if "database_session" in g:
        try:
            g.pop("database_session").close()
        except SQLAlchemyError as lost:  # a connection that can roll nothing back; the answer has all it needed
            current_app.logger.warning("a connection to the database was lost: %s", getattr(lost, "orig", lost))


session = cast(Session, LocalProxy(_session))
"""The current request's session, closed with the request whatever happens; what is not committed is rolled back."""


def ping() -> None:
    """Ask the database for nothing, by the name of each table and column that is used.

    :raises sqlalchemy.exc.SQLAlchemyError: if it does not answer, or if `lacks_tables`.
    """
    session.execute(_NOTHING_OF_EACH_TABLE)


def lacks_tables(error: object) -> bool:
    """Whether something failed only because the database is not migrated as far as this version needs it."""
    return isinstance(error, DBAPIError) and not _LACK_ERRORS.isdisjoint(_names(error))


def is_lost_race(error: DBAPIError | StaleDataError) -> bool:
    """Whether a transaction failed only because another one was faster, so that it is worth to begin it again."""
    return isinstance(error, StaleDataError) or not _RACE_ERRORS.isdisjoint(_names(error))


def _names(error: DBAPIError) -> set[Any]:
    """What the driver calls it: a number of MySQL's, a name of SQLite's."""
    return {*(error.orig.args[:1] if error.orig else ()), getattr(error.orig, "sqlite_errorname", None)}


def in_transaction(work: Callable[[], T]) -> T:
    """Run some work and commit; begin again, TRIES times in all, where another transaction was faster.

    :param work: reads what it needs itself, and does nothing but database work. Where it writes what it did not check
        a version of, it locks: `with_for_update`.
    :returns: what the last run of `work` returned.
    :raises sqlalchemy.orm.exc.StaleDataError: if the last try lost against a newer version of a row.
    :raises sqlalchemy.exc.DBAPIError: if it failed otherwise.
    """
    for tries_left in reversed(range(TRIES)):
        session.rollback()  # what was read before may be old
        g.after_commit = []
        try:
            if session.get_bind().dialect.name == "sqlite":
                # Its writers wait for one another here, instead of failing when they write on what they have read.
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            result = work()
            session.commit()
        except (DBAPIError, StaleDataError) as error:
            session.rollback()
            if not tries_left or not is_lost_race(error):
                raise
        except BaseException:
            session.rollback()
            raise
        else:
            for function in g.pop("after_commit"):
                function()
            return result
    raise AssertionError("unreachable")


def after_commit(function: Callable[[], object]) -> None:
    """Have something done once the work that `in_transaction` runs just now is committed, and not if it fails."""
    g.after_commit.append(function)


def insert_unless_exists(model: type[DeclarativeBase], **values: Any) -> None:
    """Insert a row, or leave the one that holds a unique key of it already as it is, in one statement.

    Leaves the commit to the caller. Columns without a value get their defaults.
    """
    session.execute(insert_statement(session.get_bind().dialect.name, model, values))


def insert_statement(dialect: str, model: type[DeclarativeBase], values: dict[str, Any]) -> Executable:
    """What `insert_unless_exists` says to a database of this SQLAlchemy dialect."""
    if dialect == "sqlite":
        return sqlite.insert(model).values(**values).on_conflict_do_nothing()
    unchanged = {name: getattr(model, name) for name in values}
    return mysql.insert(model).values(**values).on_duplicate_key_update(unchanged)
