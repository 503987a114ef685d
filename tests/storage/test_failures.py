import errno
import socket

import pymysql
import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from storage import failures


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), "Refuses writes."),
        (MasterDownError("Link with MASTER is down"), "Refuses writes."),
        (ClusterDownError("Hash slot not served"), "Is a Redis Cluster."),
        (BusyLoadingError("Redis is loading the dataset in memory"), "Out of service."),
        (OutOfMemoryError("command not allowed"), "Out of memory or space."),
        (AuthenticationError("invalid username-password pair"), "Wrong user or password."),
        (ResponseError("syntax error"), "Fails: see the log."),
        (pymysql.err.OperationalError(1040, "Too many connections"), "Refuses connections."),
        (pymysql.err.OperationalError(2013, "Lost connection to MySQL server"), "Does not respond."),
        (TimeoutError("timed out"), "Does not respond."),
        (RedisError("s3cret"), "Fails: see the log."),
        (RedisError(), "Fails: see the log."),
    ],
)
def test_an_error_has_a_kind(error: Exception, kind: str) -> None:
    assert failures.kind(error) == kind


def test_the_cause_says_what_the_error_does_not() -> None:
    for cause, kind in (
        (socket.gaierror(-2, "Name or service not known"), "Unknown host."),
        (ConnectionRefusedError(111, "Connection refused"), "Refuses connections."),
        (TimeoutError("timed out"), "Does not respond."),
        (OSError(errno.EMFILE, "Too many open files"), "Out of descriptors."),
    ):
        error = pymysql.err.OperationalError(2003, "Can't connect to MySQL server on 'host'")
        error.__context__ = cause
        assert failures.kind(error) == kind
