"""In processes of their own, as the standard library is patched there."""

import subprocess
import sys

from dev.redis_server import RedisServer
from tests.databases import Databases
from tests.harness import ROOT, WAIT_SECONDS, migrate


def run(program: str, *arguments: str) -> None:
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
from storage.shared_reads import SharedReads

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
client.error = ConnectionError("away")
assert set(results(together())) == {"ConnectionError"}
client.error = None
assert results(together()) == values
"""
    run(program, redis_server.url)


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
    run(program, url)
