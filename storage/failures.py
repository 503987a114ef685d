"""Why Redis or the database cannot be used: the errors of both, and of the network, by kind."""

import errno
import socket
from typing import Any

from redis import exceptions
from redis.sentinel import MasterNotFoundError
from sqlalchemy.orm.exc import StaleDataError

READ_ONLY = {1036, 1290, 1792, 1836, "SQLITE_READONLY", "SQLITE_READONLY_DBMOVED"}
"""Takes no writes, and has rolled the transaction back."""
LOST = READ_ONLY | {1062, "SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY", 1213, 1020, StaleDataError}
LOST |= {1047, 8002, 8005, 8022, 8028, 9007}
"""Nothing is committed, and a retry may succeed: also if the same row was inserted concurrently (MySQL, SQLite,
SQLite), after a deadlock or, at COMMIT, another node's write (Galera), by MariaDB's snapshot isolation, and if a row's
version is another one now; if Galera has no quorum; and TiDB's write conflicts, commits that it has rolled back, and
changes of the schema."""
CUT_OFF = {1053, 1180, 1927, 2006, 2013}
"""The server stops, Galera's group breaks up, or the connection ends: whether a COMMIT succeeded then is unknown, and
what was not committed is rolled back."""
FAILOVERS = READ_ONLY | {1047, 1053, 1180, 3032, 3100}
"""A new connection may lead to a better server: also from Galera without quorum, a shutdown, a group that broke up,
offline mode, and a primary that left its group."""
CLUSTER = exceptions.MovedError, exceptions.ClusterCrossSlotError, exceptions.ClusterDownError
_KINDS: dict[str, set[Any]] = {
    "Not migrated.": {1146, 1054, "SQLITE_ERROR"},  # the latter for any wrong statement, which has no other cause here
    "Read-only.": {*READ_ONLY, exceptions.ReadOnlyError, errno.EROFS},
    "Refuses writes.": {"MISCONF", "NOREPLICAS", exceptions.MasterDownError},
    "Out of service.": {*FAILOVERS, exceptions.BusyLoadingError},
    "Out of descriptors.": {errno.EMFILE, errno.ENFILE},
    "Out of memory or space.": {1021, 1041, 1114, "SQLITE_FULL", errno.ENOSPC, exceptions.OutOfMemoryError},
    "Is a Redis Cluster.": {*CLUSTER},
    "Wrong user or password.": {1045, 1698, exceptions.AuthenticationError},
    "No permission.": {1044, 1142, 1143, 1227, exceptions.NoPermissionError, PermissionError},
    "Unknown database.": {1046, 1049, "DB", "SQLITE_CANTOPEN", "SQLITE_NOTADB"},
    "Unknown host.": {socket.gaierror},
    "No primary.": {MasterNotFoundError},
    "Refuses connections.": {1040, 1203, 1226, "max", ConnectionRefusedError, FileNotFoundError},
    "Does not respond.": {2006, 2013, TimeoutError},
}


def codes(error: BaseException | None) -> set[Any]:
    """Return what an error is known by: its classes, MySQL's number, SQLite's name, the first word of Redis."""
    first = str(error.args[0]).rpartition("caused error: ")[2].partition(" ")[0] if error and error.args else ""
    return {*type(error).__mro__, int(first) if first.isdecimal() else first, getattr(error, "sqlite_errorname", None)}


def may_repeat(error: BaseException, is_safe: bool) -> bool:
    """Whether a transaction that failed with this error may run again at once.

    :param is_safe: whether it does no harm to run it again, whatever became of its COMMIT.
    """
    has_waited = isinstance(error.__context__, TimeoutError)  # and would again, behind what it left on the server
    return not codes(error).isdisjoint(LOST | CUT_OFF if is_safe and not has_waited else LOST)


def kind(error: BaseException | None) -> str:
    """Say in a few words, which quote nothing, why something failed: by the error or what caused it."""
    for text, known in _KINDS.items():
        if not known.isdisjoint(codes(error)):
            return text
    return kind(error.__cause__ or error.__context__) if error else "Fails: see the log."
