"""deploy/backup with SQLite, and the copy of MariaDB's binary log; restore.py restores MariaDB.

`.ci/run` installs Debian's age.
"""

import hashlib
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis

from tests.blueprints.callers import ORDER
from tests.databases import MariaDB
from tests.deploy.backups import AGE, FOLDER, README, Backups, BinlogCopy, section, statements
from tests.deploy.systemd import needs_systemd, verify
from tests.harness import PERSON, Service, Simulator, migrate, suspend, wait_until
from tests.proxy import Proxy

pytestmark = pytest.mark.skipif(AGE is None, reason="age is not installed")


def add_user(file: Path, openid: str) -> None:
    columns = "app_id, openid, role, version, created_at, updated_at"
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(f"INSERT INTO users ({columns}) VALUES ('wx', ?, 'user', 1, '2026', '2026')", [openid])


def openids(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as database:
        return [openid for (openid,) in database.execute("SELECT openid FROM users ORDER BY id")]


class Stage:
    """A database with a user, and backups of it."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "here" / "kuaishang.db"
        self.database.parent.mkdir()
        migrate(f"sqlite:///{self.database}")
        add_user(self.database, "o-first")
        self.backups = Backups(folder / "backups", f"sqlite:///{self.database}")

    def clear(self) -> None:
        for path in self.database.parent.iterdir():
            path.unlink()

    def refusal(self, file: Path, *more: str, identity: Path | None = None) -> str:
        """Return why a restore is refused; nothing has changed then."""
        before = {path: path.read_bytes() for path in self.database.parent.iterdir()}
        done = self.backups.run("restore", file, "--identity", identity or self.backups.identity, *more)
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr
        assert {path: path.read_bytes() for path in self.database.parent.iterdir()} == before
        return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def write_checksum(file: Path) -> None:
    Path(f"{file}.sha256").write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n")


def test_a_restored_service_knows_its_users_and_their_orders(
    start_service: Callable[..., Service], simulator: Simulator, redis: Redis, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'kuaishang.db'}"
    migrate(url)
    service = start_service(DATABASE_URL=url)
    token = service.log_in(simulator, openid="o-before")
    service.call("PUT", "/users/me/phone", token, json={"code": simulator.phone_code(phone=PERSON["phone"])})
    order = service.call("POST", "/orders", token, json=ORDER).json()["data"]
    before = service.read_me(token).json()["data"]
    backups = Backups(tmp_path / "backups", url)
    file = backups.make()
    lost = service.log_in(simulator, openid="o-after")
    service.discard()

    backups.restore(file, "--replace")
    service = start_service(DATABASE_URL=url)
    assert service.read_me(token).json()["data"] == before  # Redis still has the session
    assert service.call("GET", f"/orders/{order['id']}", token).json()["data"] == order
    assert service.read_me(service.log_in(simulator, openid="o-before")).json()["data"]["id"] == before["id"]
    # Whoever came after the backup is unknown, and nobody gets their id, which their session and others may still name.
    assert service.read_me(lost).status_code == 401
    newest = service.read_me(service.log_in(simulator, openid="o-newest")).json()["data"]
    assert newest["id"] > 1_000_000


def test_a_damaged_backup_changes_nothing(stage: Stage, tmp_path: Path) -> None:
    file = stage.backups.make()
    stage.clear()
    content = file.read_bytes()
    for damaged in (content[:-100], content[:100] + bytes([content[100] ^ 1]) + content[101:], b""):
        file.write_bytes(damaged)
        assert "does not have the checksum" in stage.refusal(file)
        write_checksum(file)
        assert "cannot be decrypted, or is cut short" in stage.refusal(file)
        file.write_bytes(content)
        write_checksum(file)
    other = Backups(tmp_path / "other", "sqlite:////nowhere")
    assert "cannot be decrypted" in stage.refusal(file, identity=other.identity)
    Path(f"{file}.sha256").unlink()
    assert "is missing" in stage.refusal(file)
    write_checksum(file)
    assert stage.backups.run("verify", file, "--identity", stage.backups.identity).returncode == 0
    stage.backups.restore(file)
    assert openids(stage.database) == ["o-first"]


def test_rows_are_replaced_only_on_demand(stage: Stage) -> None:
    file = stage.backups.make()
    add_user(stage.database, "o-second")
    assert "the database has rows, in users" in stage.refusal(file)
    with closing(sqlite3.connect(stage.database)) as database:
        database.execute("SELECT 1 FROM users")
        assert "the database is in use" in stage.refusal(file, "--replace")
    stage.backups.restore(file, "--replace")
    assert openids(stage.database) == ["o-first"]
    with closing(sqlite3.connect(stage.database)) as database, database:
        database.execute("DELETE FROM users")
    stage.backups.restore(file)  # it has tables, and nothing in them
    assert openids(stage.database) == ["o-first"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root restores for another user")
def test_what_root_restores_belongs_to_whom_the_folder_or_the_file_before_does(stage: Stage) -> None:
    file, folder = stage.backups.make(), stage.database.parent

    def restored() -> tuple[int, int, int]:
        stage.backups.restore(file, "--replace")
        found = stage.database.stat()
        return found.st_uid, found.st_gid, found.st_mode & 0o777

    stage.clear()
    folder.chmod(0o755)
    os.chown(folder, 4321, 1234)
    assert restored() == (4321, 1234, 0o640)
    os.chown(stage.database, 4322, 1234)
    stage.database.chmod(0o604)
    assert restored() == (4322, 1234, 0o604)


def test_a_backup_that_fails_leaves_the_others(stage: Stage) -> None:
    first = stage.backups.make()
    assert first.stat().st_mode & 0o777 == 0o600
    assert b"o-first" not in first.read_bytes()
    stage.backups.recipients.rename(stage.backups.recipients.with_name("gone"))
    wait_until(lambda: f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}" not in first.name)  # each second has a name of its own
    failed = stage.backups.run("make", "--to", first.parent, "--recipients", stage.backups.recipients, "--keep", "1")
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, "backup: age has failed")
    assert sorted(first.parent.iterdir()) == [first, Path(f"{first}.sha256")]
    stage.backups.recipients.with_name("gone").rename(stage.backups.recipients)
    Path(f"{first}.sha256").unlink()
    older = [first.with_name(f"kuaishang-2026010{day}T000000Z.sqlite.gz.age") for day in range(1, 5)]
    first.rename(older[0])
    for file in older:
        file.touch()
        write_checksum(file)
    made = stage.backups.make("--keep", "2")
    assert sorted(first.parent.glob("*.age")) == [older[-1], made]
    assert len(list(first.parent.iterdir())) == 4


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_the_alarms_pass_their_tests() -> None:
    subprocess.run(["promtool", "test", "rules", str(FOLDER / "rules.test.yml")], check=True)


@needs_systemd
def test_systemd_accepts_the_units() -> None:
    units = sorted([*FOLDER.glob("*.service"), *FOLDER.glob("*.timer")])
    verify(*units, ours="kuaishang")
    assert "\nRestart=always\n" in (FOLDER / "kuaishang-binlog.service").read_text()


@pytest.mark.skipif(not (shutil.which("rsync") and shutil.which("rrsync")), reason="rsync is not installed")
def test_another_machine_may_fetch_the_backups_and_nothing_else(tmp_path: Path) -> None:
    """By the lines of README.md; in place of sshd a script runs what the key allows."""
    allowed, fetch = (
        re.search(pattern, README)[1]  # type: ignore[index]
        for pattern in (r'command="(.+?)"', r"(?m)^    (rsync .+)$")
    )
    user = re.search(r"(\w+)@", fetch)[1]  # type: ignore[index]
    assert not pwd.getpwnam(user).pw_shell.endswith("nologin")
    here, there = tmp_path / "server", tmp_path / "fetched"
    for folder in (here, there):
        folder.mkdir()
    (here / "a.age").write_text("a backup")
    (here / "b.age.part").write_text("half a")
    (tmp_path / "secret").write_text("a secret")
    shell = tmp_path / "ssh"
    command = allowed.replace("/var/backups/kuaishang", str(here))
    shell.write_text(f'#!/bin/sh\nshift 3  # -l root 10.0.0.1\nSSH_ORIGINAL_COMMAND="$*" exec {command}\n')
    shell.chmod(0o755)

    def run(line: str) -> int:
        words = shlex.split(line.replace("/var/backups/kuaishang", str(there)))
        return subprocess.run(["env", f"RSYNC_RSH={shell}", *words], capture_output=True).returncode

    assert run(fetch) == 0
    assert (there / "a.age").read_text() == "a backup"
    for forbidden in (f"{tmp_path}/secret", "/../secret"):
        run(fetch.replace(":/ ", f":{forbidden} "))
    assert [path.name for path in there.iterdir()] == ["a.age"]
    assert run(f"rsync {tmp_path}/secret root@10.0.0.1:/") != 0
    assert sorted(path.name for path in here.iterdir()) == ["a.age", "b.age.part"]
    (here / "a.age").write_text("spoilt")
    assert run(fetch) == 0
    assert (there / "a.age").read_text() == "a backup"


class QuietProxy(Proxy):
    """A proxy with a connection that stays open and passes on nothing more that the server sends."""

    def __init__(self, target: str) -> None:
        self._quiet: frozenset[socket.socket] = frozenset()
        super().__init__(target)

    def silence(self) -> None:
        """Wait until there is but one connection, and let it be that."""

        def only_one() -> bool:
            self._quiet = opened if len(opened := frozenset(self._open)) == 2 else frozenset()
            return bool(self._quiet)

        wait_until(only_one)

    def _answer(self, data: bytes, sink: socket.socket) -> None:
        if sink not in self._quiet:
            super()._answer(data, sink)


class Copying:
    """A server, the copy of its binary log, and the proxy between them, with the lines of README.md."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.certify()
        for name in ("pem", "key"):
            (folder / f"kuaishang.{name}").rename(folder / f"server.{name}")
        lines = [line.replace("/etc/mysql/kuaishang", f"{folder}/server") for line in section("mysqld")]
        self.server = MariaDB(folder / "server", *(f"--{line.replace(' = ', '=')}" for line in lines))
        self.server.start()
        for statement in statements("binlog"):
            self.server.execute(statement)
        self.proxy = QuietProxy(self.server.socket)
        self.options = [
            line.replace("10.0.0.1", "127.0.0.1").replace("/etc/kuaishang/database.pem", f"{folder}/server.pem")
            for line in [*section("client"), f"port = {self.proxy.port}"]
        ]
        self.copy = BinlogCopy(folder / "other", self.options, seconds=2)

    def certify(self) -> None:
        """Make a certificate for this machine, kuaishang.pem."""
        line = re.search(r"(?m)^    (openssl .+)$", README)[1]  # type: ignore[index]
        words = shlex.split(line.replace("/etc/mysql", str(self._folder)).replace("IP:10.0.0.1", "IP:127.0.0.1"))
        subprocess.run(words, check=True, capture_output=True)

    def missing(self) -> int:
        """Return how many bytes of the server's newest file the copy does not have."""
        name, position, *_ = self.server.execute("SHOW MASTER STATUS")
        file = self.copy.files / name
        return int(position) - (file.stat().st_size if file.exists() else 0)

    def close(self) -> None:
        self.copy.kill()
        self.proxy.refuse()
        self.server.close()


@pytest.fixture
def copying(tmp_path: Path) -> Iterator[Copying]:
    with closing(Copying(tmp_path)) as stage:
        yield stage


@pytest.mark.only_on("mariadb")
def test_a_copy_of_the_binary_log_that_stands_still_ends(copying: Copying) -> None:
    server, copy = copying.server, copying.copy
    copy.wait_until_whole()
    assert copying.missing() == 0

    copying.proxy.silence()
    server.execute("CREATE DATABASE meanwhile")
    assert copying.missing() > 0
    newest, checks = max(copy.files.iterdir()), copying.proxy.accepted
    os.utime(newest, (time.time() + 3600,) * 2)  # as if it still grew
    wait_until(lambda: copying.proxy.accepted > checks + 2)
    assert copy.running(), copy.output()
    os.utime(newest, (0, 0))
    wait_until(lambda: not copy.running())
    copy.wait_until_whole()
    assert copying.missing() == 0

    assert server.process
    suspend(server.process)
    before = newest.read_bytes()
    for _ in range(2):
        wait_until(lambda: not copy.running())
        copy.start()
    assert newest.read_bytes() == before
    server.process.send_signal(signal.SIGCONT)
    server.execute("CREATE DATABASE afterwards")
    copy.wait_until_whole()
    assert copying.missing() == 0


@pytest.mark.only_on("mariadb")
def test_the_binary_log_is_copied_only_from_the_server_that_is_known(copying: Copying) -> None:
    copying.certify()
    for options, reason in (
        ([line.replace("server.pem", "kuaishang.pem") for line in copying.options], "certificate"),
        ([line.replace("127.0.0.1", "localhost") for line in [*copying.options, "protocol = tcp"]], "certificate"),
        ([line for line in [*copying.options, "skip-ssl"] if not line.startswith("ssl")], "Access denied"),
    ):
        copying.copy.configure(options)
        copying.copy.start()
        wait_until(lambda: not copying.copy.running())
        assert reason in copying.copy.output()
    assert [file.stat().st_size for file in copying.copy.files.iterdir()] == [0]
