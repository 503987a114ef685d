"""Why Redis or the database cannot be used: the errors of both, and of the network, by kind."""

import errno
import socket
from typing import Any

from redis import exceptions
from sqlalchemy.orm.exc import StaleDataError

READ_ONLY = {1036, 1290, 1792, 1836, "SQLITE_READONLY", "SQLITE_READONLY_DBMOVED"}
"""Takes no writes, and has rolled the transaction back."""
LOST = READ_ONLY | {1062, "SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY", 1213, 1020, StaleDataError}
"""Nothing is committed, and a retry may succeed: also if the same row was inserted concurrently (MySQL, SQLite,
SQLite), after a deadlock, by MariaDB's snapshot isolation, and if a row's version is another one now."""
FAILOVERS = READ_ONLY | {1047, 1053, 3032, 3100}
"""A new connection may lead to a better server: also from Galera without quorum, a shutdown, offline mode, and a
primary that left its group."""
_KINDS: dict[str, set[Any]] = {
    "Not migrated.": {1146, 1054, "SQLITE_ERROR"},  # the latter for any wrong statement, which has no other cause here
    "Read-only.": {*READ_ONLY, exceptions.ReadOnlyError, errno.EROFS},
    "Refuses writes.": {"MISCONF", "NOREPLICAS", exceptions.MasterDownError},
    "Out of service.": {*FAILOVERS, exceptions.BusyLoadingError},
    "Out of descriptors.": {errno.EMFILE, errno.ENFILE},
    "Out of memory or space.": {1021, 1041, 1114, "SQLITE_FULL", errno.ENOSPC, exceptions.OutOfMemoryError},
    "Is a Redis Cluster.": {exceptions.MovedError, exceptions.ClusterCrossSlotError, exceptions.ClusterDownError},
    "Wrong user or password.": {1045, 1698, exceptions.AuthenticationError},
    "No permission.": {1044, 1142, 1143, 1227, exceptions.NoPermissionError, PermissionError},
    "Unknown database.": {1046, 1049, "DB", "SQLITE_CANTOPEN", "SQLITE_NOTADB"},
    "Unknown host.": {socket.gaierror},
    "Refuses connections.": {1040, 1203, 1226, "max", ConnectionRefusedError, FileNotFoundError},
    "Does not respond.": {2006, 2013, TimeoutError},
}


def codes(error: BaseException | None) -> set[Any]:
    """Return what an error is known by: its classes, MySQL's number, SQLite's name, the first word of Redis."""
    first = str(error.args[0]).partition(" ")[0] if error and error.args else ""
    return {*type(error).__mro__, int(first) if first.isdecimal() else first, getattr(error, "sqlite_errorname", None)}


def kind(error: BaseException | None) -> str:
    """Say in a few words, which quote nothing, why something failed: by the error or what caused it."""
    while error is not None:
        for text, known in _KINDS.items():
            if not known.isdisjoint(codes(error)):
                return text
        error = error.__cause__ or error.__context__
    return "Fails: see the log."
