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


@pytest.mark.parametrize("number", [1047, 1213, 8002, 8005, 8022, 8028, 9007])
def test_what_is_rolled_back_for_certain_may_be_repeated(number: int) -> None:
    error = pymysql.err.OperationalError(number, "")
    assert failures.may_repeat(error, is_safe=False)
    assert failures.may_repeat(error, is_safe=True)


@pytest.mark.parametrize("number", [1053, 1180, 1927, 2006, 2013])
def test_what_may_have_been_committed_is_repeated_only_where_that_is_safe(number: int) -> None:
    error = pymysql.err.OperationalError(number, "")
    assert not failures.may_repeat(error, is_safe=False)
    assert failures.may_repeat(error, is_safe=True)
    error.__context__ = TimeoutError("timed out")
    assert not failures.may_repeat(error, is_safe=True)


@pytest.mark.parametrize("number", [1146, 1205, 8001, 8004])
def test_what_would_fail_again_is_not_repeated(number: int) -> None:
    assert not failures.may_repeat(pymysql.err.OperationalError(number, ""), is_safe=True)


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
