"""Backs up the database, encrypted, and restores it.

    python3 backup.py make --to /var/backups/kuaishang --recipients backup.pub
    python3 backup.py verify FILE --identity backup.key
    python3 backup.py restore FILE --identity backup.key

The database is DATABASE_URL of `--env-file`, the file of settings: MariaDB or MySQL through mariadb-dump in one
transaction, so all of it is of one moment, though it is written to; or SQLite through its own backup. age encrypts for
the public keys in `--recipients`; the private one is needed only to verify and restore, and belongs on no server.
Beside each file is its checksum, as sha256sum writes it. So a file can be restored without this program, too:

    sha256sum --check FILE.sha256 && age --decrypt --identity backup.key FILE | zcat | mariadb kuaishang

`restore` first reads the whole file: one that is damaged, cut short or for another key changes nothing. It refuses a
database that is in use, and one that has rows, unless `--replace` says that they go. No id that was given after the
backup is given again: new ones begin `--skip-ids` later.

Needs Python 3.11 and Debian's age, and for MariaDB and MySQL its mariadb-client. No password is an argument of a
program or in its environment.

Exit status: 0 done; 1 not done, and the last line says why; 2 wrong arguments.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, unquote

sys.dont_write_bytecode = True  # into the tree
sys.path.append(str(Path(__file__).resolve().parents[2]))

from deploy.patch.supervisor import read_env

LAST_LINE = b"-- Dump completed"
SCHEMA_VERSION = "alembic_version"
"""The table that has a row in an empty database, too."""


class Refused(Exception):
    """It is not done; the text says why."""


class Failed(Refused):
    """A program whose output was read has failed; its own words are on stderr."""


class MySQL:
    """A database of MariaDB or MySQL, by the programs of mariadb-client.

    :param server: host and port instead of those of the URL, such as a replica's.
    """

    suffix = ".sql.gz.age"

    def __init__(self, url: str, server: str | None) -> None:
        parts = re.fullmatch(r"[a-z+]+://(?:([^@]*)@)?([^/?]*)/([^/?]+)(?:\?(.*))?", url)
        if not parts:
            raise Refused("DATABASE_URL is malformed")
        user, _, password = (parts[1] or "").partition(":")
        address = re.fullmatch(r"\[?(.*?)\]?(?::(\d+))?", server or parts[2])
        assert address
        self._name = unquote(parts[3])
        options = {"user": unquote(user), "password": unquote(password), "host": address[1], "port": address[2]}
        for name, value in parse_qsl(parts[4] or ""):
            if name == "ssl_check_hostname":
                options["ssl-verify-server-cert"] = str(int(value == "true"))
            elif name.startswith("ssl_"):
                options[name.replace("_", "-")] = value
            elif name == "unix_socket" and not server:
                options["socket"] = value
        lines = [f"{name}={_quoted(value)}" for name, value in options.items() if value]
        # In memory, where nobody else can read it, and gone with this process.
        self._options = os.memfd_create("options")
        os.fchmod(self._options, 0o600)  # or the programs ignore it
        os.write(self._options, "\n".join(["[client]", *lines, ""]).encode())

    @contextlib.contextmanager
    def snapshot(self, position: bool) -> Iterator[IO[bytes]]:
        """Yield the database as it is now."""
        words = ["--single-transaction", "--quick", "--hex-blob", "--default-character-set=utf8mb4"]
        words += ["--master-data=2"] if position else []
        with _output(**self._command("mariadb-dump", *words, self._name)) as dump:
            yield dump

    def users(self) -> list[str]:
        """Return who is connected to it, as far as its user may know."""
        others = f"db = {_quoted(self._name)} AND id <> CONNECTION_ID()"
        return self._query(f"SELECT CONCAT('connection ', id) FROM information_schema.processlist WHERE {others}")

    def full_tables(self) -> list[str]:
        """Return the tables that have rows."""
        tables = self._query(f"SELECT table_name FROM {self._tables}")
        asked = [table for table in tables if table != SCHEMA_VERSION]
        return [table for table in asked if self._query(f"SELECT 1 FROM {self._full_name(table)} LIMIT 1")]

    def restore(self, content: gzip.GzipFile, skip_ids: int) -> None:
        """Replace it."""
        name = _identifier(self._name)
        self._query(f"DROP DATABASE IF EXISTS {name}; CREATE DATABASE {name} CHARACTER SET utf8mb4")
        command = self._command("mariadb", "--default-character-set=utf8mb4", self._name)
        with subprocess.Popen(**command, stdin=subprocess.PIPE) as client:
            assert client.stdin
            with suppress(BrokenPipeError), client.stdin:
                shutil.copyfileobj(content, client.stdin)
        if client.returncode:
            raise Refused("the database is incomplete now: see the line above, and restore again with --replace")
        counters = self._query(f"SELECT table_name, auto_increment FROM {self._tables} AND auto_increment IS NOT NULL")
        for table, counter in (line.split("\t") for line in counters):
            self._query(f"ALTER TABLE {self._full_name(table)} AUTO_INCREMENT = {int(counter) + skip_ids}")

    def _command(self, program: str, *words: str) -> dict[str, Any]:
        options = f"--defaults-extra-file=/proc/self/fd/{self._options}"
        return {"args": [_program(program), options, *words], "pass_fds": [self._options]}

    def _query(self, statements: str) -> list[str]:
        words = ["--batch", "--skip-column-names", "--execute", statements]
        done: subprocess.CompletedProcess[str]
        done = subprocess.run(**self._command("mariadb", *words), capture_output=True, text=True)
        if done.returncode:
            raise Refused(done.stderr.strip())
        return done.stdout.splitlines()

    @property
    def _tables(self) -> str:
        here = f"table_schema = {_quoted(self._name)} AND table_type = 'BASE TABLE'"
        return f"information_schema.tables WHERE {here}"

    def _full_name(self, table: str) -> str:
        return f"{_identifier(self._name)}.{_identifier(table)}"


class SQLite:
    """A file of SQLite."""

    suffix = ".sqlite.gz.age"

    def __init__(self, url: str, server: str | None) -> None:
        self._file = Path(url.removeprefix("sqlite:///")).resolve()
        if server:
            raise Refused("SQLite has no server")

    @contextlib.contextmanager
    def snapshot(self, position: bool) -> Iterator[IO[bytes]]:
        if position:
            raise Refused("SQLite has no binary log")
        if not self._file.exists():
            raise Refused(f"{self._file} does not exist")
        with tempfile.TemporaryDirectory(dir=self._file.parent) as folder:  # mode 700
            copy = Path(folder) / "copy"
            with closing(sqlite3.connect(self._file)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            with copy.open("rb") as content:
                yield content

    def users(self) -> list[str]:
        found = set()
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with suppress(OSError):  # it is closed, or somebody else's
                if os.readlink(link) == str(self._file):
                    found.add(f"process {link.parts[2]}")
        return sorted(found)

    def full_tables(self) -> list[str]:
        if not self._file.exists():
            return []
        with closing(sqlite3.connect(self._file)) as database:
            found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
            asked = [table for (table,) in found if table != SCHEMA_VERSION]
            return [table for table in asked if database.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone()]

    def restore(self, content: gzip.GzipFile, skip_ids: int) -> None:
        with tempfile.TemporaryDirectory(dir=self._file.parent) as folder:
            copy = Path(folder) / "copy"
            with copy.open("xb") as output:
                shutil.copyfileobj(content, output)
            with closing(sqlite3.connect(copy)) as database, database:
                database.execute("PRAGMA journal_mode = DELETE")  # all in one file
                [(found,)] = database.execute("PRAGMA integrity_check(1)")
                if found != "ok":
                    raise Refused(f"the backup is damaged: {found}")
                for (table,) in database.execute("SELECT name FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%'"):
                    [(last,)] = database.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = ?", [table])
                    database.execute("DELETE FROM sqlite_sequence WHERE name = ?", [table])
                    database.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", [table, (last or 0) + skip_ids])
            # The service opens it, not who restores it.
            is_new = not self._file.exists()
            there = (self._file.parent if is_new else self._file).stat()
            copy.chmod(there.st_mode & (0o660 if is_new else 0o777))
            if os.geteuid() == 0 or not is_new:
                os.chown(copy, there.st_uid, there.st_gid)
            for left in ("-wal", "-shm"):  # of what was there: SQLite would apply it to this
                self._file.with_name(self._file.name + left).unlink(missing_ok=True)
            os.replace(copy, self._file)


Database = MySQL | SQLite


def database_of(env_file: Path, server: str | None) -> Database:
    url = read_env(env_file).get("DATABASE_URL")
    if not url:
        raise Refused(f"{env_file} has no DATABASE_URL")
    return (SQLite if url.startswith("sqlite:") else MySQL)(url, server)


def make(database: Database, folder: Path, recipients: Path, keep: int, position: bool) -> None:
    """Write a backup and its checksum, and remove those that are too many."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"kuaishang-{datetime.now(UTC):%Y%m%dT%H%M%SZ}{database.suffix}"
    part = file.with_name(f"{file.name}.part")
    if file.exists():
        raise Refused(f"{file} exists already")
    command = [_program("age"), "--encrypt", "--recipients-file", str(recipients)]
    try:
        with part.open("xb") as output, database.snapshot(position) as content:
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output) as age:
                assert age.stdin
                with suppress(BrokenPipeError), age.stdin, gzip.open(age.stdin, "wb", 6) as packed:
                    shutil.copyfileobj(content, packed)
            if age.returncode:
                raise Refused("age has failed")
            os.fsync(output.fileno())
        _checksum(file).write_text(f"{_sha256(part)}  {file.name}\n")
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    print(f"{file}: {file.stat().st_size} bytes")
    for old in sorted(folder.glob(f"kuaishang-*{database.suffix}"))[:-keep]:
        old.unlink()
        _checksum(old).unlink(missing_ok=True)
        print(f"{old}: removed, as {keep} are kept")


@contextlib.contextmanager
def opened(file: Path, identity: Path) -> Iterator[gzip.GzipFile]:
    """Yield what is in a backup. Whether it is whole is known at its end alone.

    :raises Refused: if it is not.
    """
    command = [_program("age"), "--decrypt", "--identity", str(identity), str(file)]
    try:
        with _output(command) as plain, gzip.open(plain) as content:
            yield content
    except (Failed, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{file} cannot be decrypted, or is cut short: {error}") from None


def verify(file: Path, identity: Path) -> None:
    """Read a backup to its end.

    :raises Refused: unless it is as it was made.
    """
    if not file.exists():
        raise Refused(f"{file} does not exist")
    if not _checksum(file).exists():
        raise Refused(f"{_checksum(file)} is missing: nobody knows whether the backup is whole")
    if _checksum(file).read_text().split()[:1] != [_sha256(file)]:
        raise Refused(f"{file} does not have the checksum in {_checksum(file).name}: it is damaged or cut short")
    size, last = 0, b""
    with opened(file, identity) as content:
        while chunk := content.read(1 << 20):
            size, last = size + len(chunk), (last + chunk)[-200:]
    if file.name.endswith(MySQL.suffix) and LAST_LINE not in last:
        raise Refused(f"{file} has no end: the dump was cut short when it was made")
    print(f"{file}: whole, {size} bytes in it")


def restore(database: Database, file: Path, identity: Path, replace: bool, skip_ids: int) -> None:
    if not file.name.endswith(database.suffix):
        raise Refused(f"{file} is of another kind of database than DATABASE_URL: want {database.suffix}")
    verify(file, identity)
    if users := database.users():
        raise Refused(f"the database is in use: stop the service first ({', '.join(users)})")
    full = database.full_tables()
    if full and not replace:
        raise Refused(f"the database has rows, in {', '.join(full)}: --replace loses them")
    with opened(file, identity) as content:
        database.restore(content, skip_ids)
    print("Restored. Next: `alembic upgrade head`, and, with the ENCRYPTION_KEYS of then, deploy/keys: its status.")


@contextlib.contextmanager
def _output(args: Sequence[str], **options: Any) -> Iterator[IO[bytes]]:
    """Yield the output of a program, which must succeed."""
    with subprocess.Popen(args, stdout=subprocess.PIPE, **options) as process:
        assert process.stdout
        yield process.stdout
    if process.returncode:
        raise Failed(f"{Path(args[0]).name} has failed")


def _program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        raise Refused(f"{name} is missing: apt-get install {'age' if name == 'age' else 'mariadb-client'}")
    return found


def _checksum(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _quoted(text: str) -> str:
    """Write a text as both an option file and SQL read it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _identifier(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "verify", "restore"):
        command = commands.add_parser(name)
        if name == "make":
            command.add_argument("--to", type=Path, required=True, metavar="FOLDER")
            command.add_argument("--recipients", type=Path, required=True, metavar="FILE", help="age's public keys")
            command.add_argument("--keep", type=int, default=14, metavar="N", help="how many backups are kept")
            command.add_argument("--binlog", action="store_true", help="note the position in the binary log")
        else:
            command.add_argument("file", type=Path)
            command.add_argument("--identity", type=Path, required=True, metavar="FILE", help="age's private key")
        if name != "verify":
            command.add_argument("--env-file", type=Path, default=Path("/srv/kuaishang/.env"), metavar="FILE")
            command.add_argument("--server", metavar="HOST:PORT", help="instead of the one of DATABASE_URL")
        if name == "restore":
            command.add_argument("--replace", action="store_true", help="lose the rows that are there")
            command.add_argument("--skip-ids", type=int, default=1_000_000, metavar="N")
    options = parser.parse_args()
    os.umask(0o077)
    try:
        if options.command == "verify":
            verify(options.file, options.identity)
            return
        database = database_of(options.env_file, options.server)
        if options.command == "restore":
            restore(database, options.file, options.identity, options.replace, options.skip_ids)
        elif options.keep < 1:
            parser.error("--keep must be 1 or more")
        else:
            make(database, options.to, options.recipients, options.keep, options.binlog)
    except (Refused, OSError, sqlite3.Error) as error:
        sys.exit(f"backup: {error}")


if __name__ == "__main__":
    main()
