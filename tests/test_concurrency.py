import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from flask import Flask, g

from concurrency import ROOM, GaveUp, context_for, ensure_somebody_waits, in_parallel, room, seconds_left
from dev.redis_server import RedisServer
from errors import ApiError, Code
from storage import database
from telemetry.traces import RequestSpan, current_ids
from tests.databases import Databases
from tests.harness import ROOT, WAIT_SECONDS, migrate


def test_functions_run_concurrently_in_contexts_of_their_own_with_the_trace_id_of_the_caller(app: Flask) -> None:
    begun: list[Any] = []

    def work() -> Any:
        begun.append(g._get_current_object())
        while len(begun) < 2:
            gevent.sleep()
        database.ping()
        return current_ids()["traceId"]

    span = RequestSpan("GET", {"HTTP_TRACEPARENT": f"00-{'a' * 32}-{'b' * 16}-01"})
    with app.app_context():
        outcomes = in_parallel({"one": work, "other": work}, WAIT_SECONDS)
        begun.append(g._get_current_object())
    span.end(200)
    assert len({id(context) for context in begun}) == 3
    assert outcomes == dict.fromkeys(("one", "other"), "a" * 32)
    assert app.extensions["database"].pool.checkedout() == 0


def test_a_failure_or_the_end_of_the_time_is_the_outcome_of_its_function_alone(app: Flask) -> None:
    error = RuntimeError("the reason")

    def fail() -> None:
        raise error

    functions = {"bad": fail, "good": lambda: None, "better": lambda: 1, "hangs": lambda: gevent.sleep(WAIT_SECONDS)}
    with app.app_context():
        outcomes = in_parallel(functions, 0.1)
    late = outcomes.pop("hangs")
    assert isinstance(late, TimeoutError)
    assert outcomes == {"bad": error, "good": None, "better": 1}


def test_parallel_functions_have_their_own_time(app: Flask) -> None:
    """A caller who has less does not make a dependency look as if it were down."""
    functions = {"left": lambda: seconds_left(1), "hangs": lambda: gevent.sleep(WAIT_SECONDS)}
    with app.app_context():
        outcomes = context_for(-1).run(in_parallel, functions, 0.2)
    assert 0 < outcomes["left"] <= 0.2
    assert isinstance(outcomes["hangs"], TimeoutError)


def is_free(weight: int) -> bool:
    try:
        with room(weight, 0):
            return True
    except ApiError:
        return False


def test_room_is_taken_by_weight_and_given_back_also_after_a_failure() -> None:
    with room(ROOM - 3):
        assert is_free(3)
        assert not is_free(4)
        with room(3):
            assert not is_free(1)
        with pytest.raises(RuntimeError), room(2):
            raise RuntimeError
        with pytest.raises(ApiError) as caught, room(4, 0):
            pass
        assert caught.value.api_code is Code.UNAVAILABLE
        assert is_free(3)
    assert is_free(ROOM)
    assert not is_free(ROOM + 1)
    assert is_free(ROOM)


def test_a_wait_for_room_ends_with_the_request() -> None:
    began = time.monotonic()
    with room(ROOM), pytest.raises(ApiError):
        context_for(0.1).run(lambda: room(1, WAIT_SECONDS).__enter__())
    assert time.monotonic() - began < WAIT_SECONDS / 2
    assert is_free(ROOM)


def test_what_is_heavy_is_not_overtaken_by_what_comes_later() -> None:
    order: list[str] = []

    def take(name: str, weight: int) -> None:
        with room(weight, WAIT_SECONDS):
            order.append(name)

    with room(1):
        heavy = gevent.spawn(take, "heavy", ROOM)
        gevent.sleep()
        assert not is_free(1)  # it waits for its turn, though there would be room for less
        light = gevent.spawn(take, "light", 1)
        gevent.sleep(0.1)
        assert order == []
    gevent.joinall([heavy, light])
    assert order == ["heavy", "light"]
    assert is_free(ROOM)


def test_two_that_take_much_do_not_block_each_other() -> None:
    taken: list[int] = []

    def take(number: int) -> None:
        with room(ROOM, 5):
            taken.append(number)

    parts = [room(1) for _ in range(ROOM)]
    for part in parts:
        part.__enter__()
    waiting = [gevent.spawn(take, number) for number in range(2)]
    for part in parts:  # both wait, and would get half of it each
        gevent.sleep(0.01)
        part.__exit__(None, None, None)
    gevent.joinall(waiting)
    assert sorted(taken) == [0, 1]


def test_a_request_that_is_given_up_gives_its_room_back() -> None:
    script = """
from gevent import monkey; monkey.patch_all()
import gevent, time
from concurrency import ROOM, room

def take(weight):
    with room(weight, 60):
        time.sleep(60)

holder, heavy, light = gevent.spawn(take, 1), gevent.spawn(take, ROOM), gevent.spawn(take, 1)
gevent.sleep(0.1)
for greenlet in (light, heavy, holder):
    greenlet.kill()
with room(ROOM, 0):
    print("free")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.stdout == "free\n", done.stderr


def test_a_client_that_has_hung_up_is_noticed(app: Flask) -> None:
    for is_gone in (True, False):
        connection = SimpleNamespace(is_gone=partial(bool, is_gone))
        expected = pytest.raises(GaveUp) if is_gone else nullcontext()
        with app.test_request_context(environ_overrides={"gunicorn.socket": connection}), expected as caught:
            ensure_somebody_waits()
        assert caught is None or caught.value.api_code.number < 500
    ensure_somebody_waits()  # outside of a request


def run_patched(program: str, *arguments: str) -> None:
    """Run a program in a process of its own, as it patches the standard library."""
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr


def test_greenlets_that_ask_at_the_same_moment_share_a_round_trip_and_nothing_else(redis_server: RedisServer) -> None:
    program = """
import sys
from gevent import monkey
monkey.patch_all()
import gevent
from redis import Redis
from redis.exceptions import ConnectionError
from flask import Flask
from concurrency import SharedReads, in_parallel

class Client(Redis):
    asked, error = [], None
    def mget(self, keys):
        self.asked.append(len(keys))
        gevent.sleep(0.05)
        if self.error:
            raise self.error
        return super().mget(keys)

client = Client.from_url(sys.argv[1])
reads = SharedReads(lambda keys: dict(zip(keys, client.mget(keys), strict=True)))
for number in range(20):
    client.set(f"k{number}", number, ex=60)

def together():
    jobs = [gevent.spawn(reads.get, f"k{number}") for number in range(21)]
    gevent.sleep(0.01)
    return jobs

def results(jobs):
    gevent.joinall(jobs)
    return [job.value if job.successful() else type(job.exception).__name__ for job in jobs]

values = [*(b"%d" % number for number in range(20)), None]
assert results(together()) == values
assert client.asked == [21], client.asked
given_up = together()  # the one that asks for all is given up, while it asks and before
given_up[0].kill()
assert results(given_up)[1:] == values[1:]
given_up = [gevent.spawn(reads.get, f"k{number}") for number in range(21)]
gevent.spawn(given_up[0].kill)
assert results(given_up)[1:] == values[1:]
assert results(together()) == values

def in_time(seconds):
    with Flask("service").app_context():
        return type(in_parallel({"read": lambda: reads.get("k0")}, seconds)["read"])

for seconds in (0, 0.02):  # nor does a time-out of its own concern others: before it asks, and while it does
    late = gevent.spawn(in_time, seconds)
    gevent.sleep(0)
    assert results(together()) == values
    assert results([late]) == [TimeoutError]
    assert results(together()) == values
client.error = ConnectionError("away")
assert set(results(together())) == {"ConnectionError"}
client.error = None
assert results(together()) == values
"""
    run_patched(program, redis_server.url)


def test_rows_that_are_read_at_the_same_moment_are_read_in_one_statement_and_fresh(databases: Databases) -> None:
    program = """
import sys
from gevent import monkey
monkey.patch_all()
import gevent
from flask import Flask
from sqlalchemy import event, update
from sqlalchemy.exc import DBAPIError
from storage import database
from storage.models import User

app = Flask("service")
app.config.update(DATABASE_URL=sys.argv[1], DATABASE_CONNECTIONS=5)
database.init_app(app)
engine = app.extensions["database"]
with app.app_context():
    users = [User(app_id="wx", openid=f"o-{number}", nickname="old") for number in range(20)]
    database.session.add_all(users)
    database.session.commit()
    ids = [user.id for user in users]
statements = []
event.listen(engine, "before_cursor_execute", lambda *of: statements.append(of[2]))

def find(id):
    with app.app_context():
        try:
            user = database.find(User, id)
        except DBAPIError as error:
            return type(error).__name__
        return user and (user.id, user.nickname, user.created_at.tzname())

def together(*ids):
    statements.clear()
    jobs = [gevent.spawn(find, id) for id in ids]
    gevent.joinall(jobs)
    return [job.value for job in jobs]

wanted = [*reversed(ids), 999_999, ids[3]]
assert together(*wanted) == [(id, "old", "UTC") if id in ids else None for id in wanted]
assert len(statements) == 1, statements
with engine.begin() as connection:
    connection.execute(update(User).values(nickname="new"))
assert together(*ids) == [(id, "new", "UTC") for id in ids]
assert together(ids[0]) == [(ids[0], "new", "UTC")] and together(999_999) == [None]
with engine.begin() as connection:
    connection.exec_driver_sql("ALTER TABLE users RENAME TO other_users")
assert set(together(*ids)) <= {"OperationalError", "ProgrammingError"}, together(*ids)
"""
    url = databases.create()
    migrate(url)
    run_patched(program, url)
