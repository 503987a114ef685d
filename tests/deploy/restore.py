"""A backup of a MariaDB that is written to, and what it brings back when the machines of database and Redis are lost.

Not part of `make test`, as it takes some 40 s; CI runs it:

    .venv/bin/python -m pytest --database=mariadb --capture=no tests/deploy/restore.py

It prints how much was lost (RPO) and how long it took until a user had logged in and read an order (RTO): by the backup
alone, and by the binary log that was copied meanwhile, too. `.venv/bin/python -m tests.deploy.restore` writes this to
deploy/backup/restore.md.
"""

import base64
import itertools
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pymysql
import pytest
import requests

from dev.redis_server import RedisServer
from tests.blueprints.callers import ITEM
from tests.databases import MariaDB, executable
from tests.deploy.backups import AGE, Backups, BinlogCopy, section, statements
from tests.harness import (
    APP_ID,
    APP_SECRET,
    PERSON,
    ROOT,
    WAIT_SECONDS,
    Service,
    Simulator,
    bearer,
    bound_to_this_process,
    migrate,
    wait_until,
)

pytestmark = pytest.mark.skipif(AGE is None, reason="age is not installed")

PASSWORD = "a\"pass'word #\\%;"
SEEDED_ORDERS = 20_000
TABLE = ROOT / "deploy" / "backup" / "restore.md"
INTRODUCTION = f"""# What a backup brings back

`python -m tests.deploy.restore` writes this table. With {SEEDED_ORDERS * 4:,} rows, on a machine whose
{os.cpu_count()} cores had a load of {os.getloadavg()[0]:.0f} before, a user orders one thing after the other;
meanwhile a backup is made, and the binary log is copied. Then the database is killed, and its data and Redis are
gone. Each row begins in an empty place. A loss (RPO) counts from when the first of the lost orders was acknowledged
to the kill; the way back (RTO) until a user has logged in and read an order. From the backup alone all is lost that
came after it: here seconds, in production up to a day.

| restored from | acknowledged | lost | of the last seconds (RPO) | serves after seconds (RTO) |
|---|---|---|---|---|"""


class Outcome(NamedTuple):
    """What a restore has brought back.

    :param lost: acknowledged orders that are gone.
    :param lost_seconds: from the acknowledgement of the first of them to the fault.
    :param seconds: from the beginning of the restore until a user had logged in and read an order.
    """

    way: str
    acknowledged: int
    lost: int
    lost_seconds: float
    seconds: float

    def row(self) -> str:
        return f"| {self.way} | {self.acknowledged} | {self.lost} | {self.lost_seconds:.1f} | {self.seconds:.1f} |"


class Writer:
    """A user who orders one thing after the other, in a thread, until `stop`."""

    def __init__(self, service: Service, token: str) -> None:
        self._url, self._token = f"{service.url}/api/v1/orders", token
        self.acknowledged: dict[str, float] = {}
        """When, by the remark of the order, in their order."""
        self._over = False
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        for number in itertools.count():
            if self._over:
                return
            remark = f"order-{number}"
            headers = {**bearer(self._token), "Idempotency-Key": remark}
            body = {"items": [{**ITEM, "unit_price": 100 + number}, ITEM], "remark": remark}
            with suppress(requests.RequestException):
                if requests.post(self._url, json=body, headers=headers, timeout=WAIT_SECONDS).status_code == 201:
                    self.acknowledged[remark] = time.time()

    def stop(self) -> None:
        self._over = True
        self._thread.join()


class Site:
    """The service with its Redis and its MariaDB, each in a place that was empty before.

    :param keys: ENCRYPTION_KEYS.
    """

    def __init__(self, folder: Path, simulator: Simulator, keys: str, stack: ExitStack) -> None:
        self.folder = folder
        self.redis = RedisServer(folder / "redis", bound_to_this_process())
        stack.enter_context(closing(self.redis)).start()
        options = [line.replace(" = ", "=") for line in section("mysqld") if not line.startswith("ssl")]
        self.database = MariaDB(folder / "mariadb", *(f"--{option}" for option in options))
        stack.enter_context(closing(self.database)).start()
        self.database.execute("CREATE DATABASE kuaishang CHARACTER SET utf8mb4")
        escaped = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
        self.database.execute(f"CREATE USER app@localhost IDENTIFIED BY '{escaped}'")
        self.database.execute("GRANT ALL ON kuaishang.* TO app@localhost")
        self.database.execute("CREATE USER backup@localhost IDENTIFIED BY 'backup-password'")
        for statement in statements("backup")[1:]:
            self.database.execute(statement)
        for statement in statements("binlog"):
            self.database.execute(statement.replace(" REQUIRE SSL", ""))
        self.environ = {
            "WECHAT_APP_ID": APP_ID,
            "WECHAT_APP_SECRET": APP_SECRET,
            "WECHAT_API_BASE_URL": simulator.url,
            "REDIS_URL": f"{self.redis.url}?socket_timeout=10&socket_connect_timeout=10",
            "DATABASE_URL": self.url("app", PASSWORD),
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": keys,
            "WEB_CONCURRENCY": "1",
            "DRAIN_SECONDS": "0",
        }
        self._stack = stack

    def url(self, user: str, password: str) -> str:
        return f"mysql://{user}:{quote(password, safe='')}@localhost/kuaishang?unix_socket={self.database.socket}"

    def serve(self) -> Service:
        service = Service(self.environ, self.folder / f"output-{secrets.token_hex(2)}")
        self._stack.callback(service.discard)
        return service

    def query(self, statement: str) -> Sequence[tuple[Any, ...]]:
        """Run a statement as an administrator, and return the rows of its result."""
        with (
            pymysql.connect(unix_socket=self.database.socket, user="root", database="kuaishang") as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)
            connection.commit()
            return cursor.fetchall()

    def orders(self) -> Counter[str]:
        """Count the orders of the writer, by their remarks."""
        return Counter(remark for (remark,) in self.query("SELECT remark FROM orders WHERE remark IS NOT NULL"))

    def keys_status(self, keys: str) -> int:
        """Return how `flask keys status` ends with these ENCRYPTION_KEYS."""
        environ = {"ENV_FILE": "/dev/null", **self.environ, "ENCRYPTION_KEYS": keys}
        command = [sys.executable, "-m", "flask", "--app", "deploy.keys", "keys", "status"]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True).returncode


def fill(site: Site) -> None:
    """Make so many orders that a dump takes its time: for the items first, then for the orders."""
    site.query(
        "INSERT INTO orders (status, total, created_at, updated_at, version)"
        f" SELECT 'completed', 300, '2026-01-01', '2026-01-01', 1 FROM seq_1_to_{SEEDED_ORDERS}"
    )
    site.query(
        "INSERT INTO order_items (order_id, sku, name, quantity, unit_price)"
        " SELECT id, 'tea', HEX(RANDOM_BYTES(50)), 1, 100 FROM orders, seq_1_to_3"
    )


def rehearse(folder: Path, simulator: Simulator) -> list[Outcome]:
    """Lose database and Redis under writes, and restore them, in the ways that deploy/backup/README.md has."""
    keys = base64.b64encode(secrets.token_bytes(32)).decode()
    with ExitStack() as stack:
        lost = Site(folder / "lost", simulator, keys, stack)
        migrate(lost.url("root", ""))
        fill(lost)
        options = ["user = binlog", "password = …", f"socket = {lost.database.socket}"]
        copying = BinlogCopy(folder / "binlogs", options, seconds=30)
        stack.callback(copying.kill)
        copying.start()
        service = lost.serve()
        token = service.log_in(simulator, openid="o-before")
        phone = {"code": simulator.phone_code(phone=PERSON["phone"])}
        assert service.call("PUT", "/users/me/phone", token, json=phone).status_code == 200
        before = service.read_me(token).json()["data"]

        writer = Writer(service, token)
        stack.callback(writer.stop)
        wait_until(lambda: len(writer.acknowledged) > 20)
        backups = Backups(folder / "backups", lost.url("backup", "backup-password"))
        first = len(writer.acknowledged)
        file = backups.make("--binlog")
        during = len(writer.acknowledged)
        wait_until(lambda: len(writer.acknowledged) > during + 20)
        copying.kill()  # and started again, as its unit does
        copying.start()
        wait_until(lambda: len(writer.acknowledged) > during + 50)
        lost.database.kill()
        lost.redis.process.kill()  # type: ignore[union-attr]
        fault = time.time()
        writer.stop()
        service.discard()
        shutil.rmtree(lost.folder / "mariadb")
        wait_until(lambda: not copying.running())
        copying.start()  # as well, and finds no server
        wait_until(lambda: not copying.running())
        acknowledged = list(writer.acknowledged)
        outcomes = []

        for way in ("the backup", "the backup and the binary log"):
            site = Site(folder / f"new-{len(outcomes)}", simulator, keys, stack)
            backups.use(site.url("app", PASSWORD))
            began = time.monotonic()
            backups.restore(file)
            if outcomes:
                replay(site, backups, file, sorted(copying.files.iterdir()))
            there = site.orders()
            migrate(site.url("app", PASSWORD))
            service = site.serve()
            token = service.log_in(simulator, openid="o-before")
            [order] = service.call("GET", "/orders?page_size=1", token).json()["data"]["items"]
            seconds = time.monotonic() - began
            assert order["remark"] in there
            after = service.read_me(token).json()["data"]
            assert {**after, "updated_at": None} == {**before, "updated_at": None}
            newest = service.read_me(service.log_in(simulator, openid="o-after")).json()["data"]
            assert newest["id"] > 1_000_000  # no id is given twice
            service.discard()

            missing = [remark for remark in acknowledged if remark not in there]
            # Of one moment: whatever was acknowledged before it, with all items, and nothing later.
            assert missing == acknowledged[len(acknowledged) - len(missing) :]
            assert all(times == 1 for times in there.values())
            sums = "SELECT SUM(quantity * unit_price) FROM order_items WHERE order_id = orders.id"
            assert not site.query(f"SELECT id FROM orders WHERE total <> COALESCE(({sums}), 0)")
            lost_seconds = fault - writer.acknowledged[missing[0]] if missing else 0
            outcomes.append(Outcome(way, len(acknowledged), len(missing), lost_seconds, seconds))
        assert len(acknowledged) - outcomes[0].lost in range(first, during + 2)
        assert site.keys_status(keys) == 0
        assert site.keys_status(base64.b64encode(secrets.token_bytes(32)).decode()) == 1
        full = backups.run("restore", file, "--identity", backups.identity)
        assert (full.returncode, "--replace loses them" in full.stderr) == (1, True), full.stderr
        backups.restore(file, "--replace")
        assert len(site.orders()) == len(acknowledged) - outcomes[0].lost
        return outcomes


def replay(site: Site, backups: Backups, file: Path, binlogs: list[Path]) -> None:
    """Run what the copied binary logs have after the backup."""
    script = f"age --decrypt --identity {backups.identity} {file} | zcat | grep --max-count=1 'CHANGE MASTER'"
    position = subprocess.run(script, shell=True, capture_output=True, text=True).stdout
    found = re.search(r"MASTER_LOG_FILE='(.+?)', MASTER_LOG_POS=(\d+)", position)
    assert found
    later = [str(log) for log in binlogs if log.name >= found[1]]
    command = [executable("mariadb-binlog"), f"--start-position={found[2]}", "--database=kuaishang", *later]
    client = [executable("mariadb"), "--user=root", f"--socket={site.database.socket}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as events:
        subprocess.run(client, stdin=events.stdout, check=True)
    assert events.returncode == 0


@pytest.mark.only_on("mariadb")
def test_what_was_acknowledged_comes_back(tmp_path: Path, shared_simulator: Simulator) -> None:
    backup, with_log = rehearse(tmp_path, shared_simulator)
    print("", backup.row(), with_log.row(), sep="\n")  # noqa: T201
    assert backup.lost > 50
    assert with_log.lost_seconds < 1


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        simulator = Simulator(folder / "output")
        stack.callback(simulator.process.stop)
        rows = [outcome.row() for outcome in rehearse(folder, simulator)]
    TABLE.write_text("\n".join([INTRODUCTION, *rows, ""]))


if __name__ == "__main__":
    main()
