"""The one file on a machine that has nothing but glibc: a chroot that debootstrap makes, without Python.

Not part of `make test`, as it takes some minutes, root and the internet:

    .venv/bin/python -m pytest tests/deploy/one_file.py

BARE_MACHINE names a folder to keep the machine in, for the next time.
"""

import gzip
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

import settings
from deploy.binary import build
from dev.run import SIMULATED_ACCOUNT
from tests.docs.pages import blocks, page
from tests.harness import METRICS_TOKEN, ROOT, WAIT_SECONDS, bearer, free_port, until_available, wait_until

ITEM = {"sku": "tea-01", "name": "大红袍", "quantity": 2, "unit_price": 12800}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("built") / "kuaishang"
    build_to(file)
    return file


def build_to(file: Path, root: Path = ROOT, **env: str) -> None:
    command = [ROOT / ".venv" / "bin" / "python", "-m", "deploy.binary.build", "--output", file]
    subprocess.run(command, cwd=root, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"} | env, check=True)


ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


class Machine:
    """A folder with Debian's smallest system, in which commands run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / "bin" / "sh").exists():
            subprocess.run(
                ["debootstrap", "--variant=minbase", "bookworm", root], check=True, stdout=subprocess.DEVNULL
            )
        root.chmod(0o755)  # pytest made it for its owner alone
        assert not list(root.glob("usr/bin/python*"))

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Run the file with these words, in a folder with modules that it must not take for its own."""
        trap = self.root / "trap"
        trap.mkdir(exist_ok=True)
        for module in ("service", "settings", "wsgi"):
            (trap / f"{module}.py").write_text("raise RuntimeError('not ours')")
        return subprocess.Popen(
            ["chroot", self.root, "/bin/sh", "-c", 'cd /trap && exec /opt/kuaishang/kuaishang "$@"', "sh", *words],
            env={**ENVIRON, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, **env: str) -> tuple[int, str]:
        process = self.start(*words, **env)
        said, _ = process.communicate(timeout=WAIT_SECONDS)
        return process.returncode, said

    def shell(self, folder: str, script: str) -> tuple[int, str]:
        """Run lines in a folder, and stop at the first one that fails."""
        done = subprocess.run(
            ["chroot", self.root, "/bin/sh", "-euc", f"cd {folder}\n{script}"],
            env=ENVIRON,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * WAIT_SECONDS,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = Path(os.environ.get("BARE_MACHINE") or tmp_path_factory.mktemp("machine"))
    machine = Machine(root)
    with ExitStack() as stack:
        for kind, place in (("proc", "proc"), ("tmpfs", "dev/shm")):
            (root / place).mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", kind, kind, root / place], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", root / place], check=True)
        yield machine


class Running:
    """A command of the file, and what it prints."""

    def __init__(self, machine: Machine, *words: str, **env: str) -> None:
        self.process = machine.start(*words, **env)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout:
            self.lines.extend(line for line in self.process.stdout)

    def printed(self) -> str:
        return "".join(self.lines)

    def wait_for(self, words: str, count: int = 1) -> None:
        """Wait until it has printed these words so many times."""
        deadline = time.monotonic() + 2 * WAIT_SECONDS
        while self.printed().count(words) < count:
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(WAIT_SECONDS) == 0, self.printed()
        self._reader.join()


@pytest.fixture(scope="session")
def installed(machine: Machine, built: Path) -> Path:
    """The file in the machine: it is all that is copied."""
    folder = machine.root / "opt" / "kuaishang"
    for old in (folder, machine.root / "root" / ".cache", machine.root / "root" / "demo"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir()
    return Path(shutil.copy(built, folder / "kuaishang"))


def log_in(url: str, simulator: str) -> dict[str, str]:
    def attempt() -> requests.Response:
        code = requests.post(f"{simulator}/simulator/codes", timeout=WAIT_SECONDS).json()["code"]
        return requests.post(f"{url}/api/v1/auth/wechat", json={"code": code}, timeout=WAIT_SECONDS)

    answer = until_available(attempt)  # with another code each time: the service may have used the one before
    assert answer.status_code == 200, answer.text
    return bearer(answer.json()["data"]["token"])


class Demo:
    def __init__(self, machine: Machine) -> None:
        port, simulator_port = free_port(), free_port()
        self.url, self.simulator = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{simulator_port}"
        ports = {"PORT": str(port), "SIMULATOR_PORT": str(simulator_port)}
        self.running = Running(machine, "demo", "--var", "/root/demo", **ports)
        self.running.wait_for("Log in")
        self.redis_url = self.running.printed().partition("Redis ")[2].split()[0]
        self.secrets = (machine.root / "root" / "demo" / "secrets.env").read_text()


@pytest.fixture(scope="session")
def demo(machine: Machine, installed: Path) -> Iterator[Demo]:
    demo = Demo(machine)
    yield demo
    demo.running.stop()


@pytest.fixture
def env_file(demo: Demo, installed: Path) -> Iterator[Path]:
    """The file of the settings, beside the one file: the demo's stand-ins, and a database of its own."""
    lines = {
        **SIMULATED_ACCOUNT,
        "WECHAT_API_BASE_URL": demo.simulator,
        "REDIS_URL": demo.redis_url,
        "DATABASE_URL": "sqlite:////root/served.db",
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "DRAIN_SECONDS": "0",
        "LOG_LEVEL": "WARNING",
        "METRICS_TOKEN": METRICS_TOKEN,
    }
    file = installed.with_name(".env")
    file.touch(0o600)
    file.write_text(demo.secrets + "".join(f"{name}={value}\n" for name, value in lines.items()))
    yield file
    file.unlink()


def test_two_builds_are_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """From a copy elsewhere, with another umask, time zone and hash seed."""
    copy = tmp_path / "elsewhere" / "tree"
    ignored = shutil.ignore_patterns(".venv", "var", "__pycache__", "dist", "node_modules", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    umask = os.umask(0o077)
    try:
        build_to(tmp_path / "again", copy, TZ="Asia/Shanghai", PYTHONHASHSEED="7", LC_ALL="C", HOME=str(tmp_path))
    finally:
        os.umask(umask)
    assert differing(built, tmp_path / "again") == []


def archive(file: Path) -> tuple[bytes, tarfile.TarFile]:
    """The program in front, and the archive."""
    content = file.read_bytes()
    start = int(content[-64:].split()[1])
    return content[:start], tarfile.open(fileobj=io.BytesIO(gzip.decompress(content[start:-64])))


def differing(one: Path, other: Path) -> list[str]:
    if one.read_bytes() == other.read_bytes():
        return []
    (stub, first), (other_stub, second) = archive(one), archive(other)
    with first, second:
        contents = [
            {entry.name: (entry.mode, entry.isfile() and file.extractfile(entry).read()) for entry in file}  # type: ignore[union-attr]
            for file in (first, second)
        ]
    names = sorted(contents[0].keys() | contents[1].keys())
    return [
        *["stub"] * (stub != other_stub),
        *(name for name in names if contents[0].get(name) != contents[1].get(name)),
    ]


def variant(file: Path, tree: Path, version: str = settings.VERSION, **sources: str) -> bytes:
    """Return another build, of this version, in which these modules end with this source."""
    stub, packed = archive(file)
    with packed:
        packed.extractall(tree, filter="tar")
    release = tree / "app" / "release.json"
    release.write_text(release.read_text().replace(settings.VERSION, version))
    for module, source in {**sources, "settings": f"VERSION = {version!r}\n{sources.get('settings', '')}"}.items():
        path = tree / "app" / f"{module}.py"
        path.write_text(f"{path.read_text() if path.exists() else ''}\n{source}\n")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
    made = build.seal(stub, build.pack(tree, level=1))
    shutil.rmtree(tree)
    return made


def test_help_and_licences(machine: Machine, installed: Path) -> None:
    status, said = machine.run("--help")
    assert status == 0
    assert said.startswith("usage: kuaishang [COMMAND]")
    status, said = machine.run("licences")
    assert status == 0
    lines = (ROOT / "requirements.in").read_text().splitlines()
    chosen = [line.partition("[")[0] for line in lines if line and not line.startswith("#")]
    for name in ("cpython", "redis-server", "zlib1g-dev", *chosen):
        assert f"\n{name}" in said.lower().replace("_", "-"), name


def test_each_library_of_the_system_has_its_licence_inside(machine: Machine, installed: Path, built: Path) -> None:
    line = re.escape("=" * 100)
    parts = re.split(rf"^{line}\n(.+)\n{line}\n", machine.run("licences")[1], flags=re.MULTILINE)[1:]
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    _, packed = archive(built)
    with packed:
        names = [re.fullmatch(r"lib/(lib.+?)[\d.]*\.so.*", name) for name in packed.getnames()]
    libraries = {name[1] for name in names if name}
    assert {"libssl", "libcrypto", "libffi", "libsqlite", "libz"} <= libraries, libraries
    packages = {"libcrypto": "libssl", "libgcc_s": "libgcc-s", "libpython": "CPython", "libz": "zlib1g"}
    for library in libraries:
        found = [text for name, text in texts.items() if name.startswith(packages.get(library, library))]
        assert found, library
        assert min(map(len, found)) > 200, library


def test_log_in_and_order_in_the_demo(demo: Demo) -> None:
    token = log_in(demo.url, demo.simulator)
    order = requests.post(f"{demo.url}/api/v1/orders", json={"items": [ITEM]}, headers=token, timeout=WAIT_SECONDS)
    assert (order.status_code, order.json()["data"]["total"]) == (201, 25600)


def test_the_demo_has_both_documents_and_the_page_with_its_button(demo: Demo) -> None:
    for language, name in (("zh", "openapi.json"), ("en", "openapi.en.json")):
        document = requests.get(f"{demo.url}/openapi.json?lang={language}", timeout=WAIT_SECONDS)
        assert document.content == (ROOT / name).read_bytes()
    page = requests.get(f"{demo.url}/docs", timeout=WAIT_SECONDS).text
    files = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {"/docs/docs.js", "/docs/docs.css", "/docs/docs_login.js"} <= {*files}
    for file in files:
        assert requests.get(f"{demo.url}{file}", timeout=WAIT_SECONDS).status_code == 200, file
    code = requests.post(f"{demo.url}/docs/code", timeout=WAIT_SECONDS).json()["code"]
    login = requests.post(f"{demo.url}/api/v1/auth/wechat", json={"code": code}, timeout=WAIT_SECONDS)
    assert login.status_code == 200


def printed(language: str) -> list[list[str]]:
    """Return the commands of a page about the one file, by blocks, without their comments."""
    found = blocks(page(language, "one-file.md"))
    return [[line.partition("  #")[0].strip() for line in block.text.splitlines()] for block in found]


def test_the_printed_lines_lead_from_an_empty_database_to_a_service(
    machine: Machine, installed: Path, env_file: Path, built: Path
) -> None:
    first, server, upgrade = printed("en")
    assert printed("zh") == [first, server, upgrade]
    (machine.root / "root" / "served.db").unlink(missing_ok=True)
    assert machine.run("check")[0] == 1  # no tables yet
    assert [first[0], first[1], first[3]] == ["make binary", "./kuaishang demo", "./kuaishang serve"]
    status, said = machine.shell("/opt/kuaishang", first[2])
    assert (status, said.splitlines()[-1].partition("{")[0]) == (0, "readyz     200 "), said
    shutil.copy(built, installed.with_name("kuaishang.new"))
    *lines, reload = upgrade
    status, said = machine.shell("/opt/kuaishang", "\n".join(lines))
    assert (status, reload) == (0, "systemctl reload kuaishang"), said
    assert not installed.with_name("kuaishang.new").exists()

    copy = machine.root / "root" / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    unit = Path("deploy", "binary", "kuaishang.service")
    for path, content in ((Path("dist", "kuaishang"), built), (unit, ROOT / unit), (Path(".env"), env_file)):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(content, copy / path)
    (copy / ".env").write_text((copy / ".env").read_text() + "DATABASE_URL=sqlite:////tmp/unit.db\n")
    (machine.root / "tmp" / "unit.db").unlink(missing_ok=True)
    *lines, enable = server
    status, said = machine.shell("/root/copy", "\n".join(lines))
    assert (status, enable) == (0, "systemctl enable --now kuaishang"), said
    assert (machine.root / "tmp" / "unit.db").stat().st_uid == env_file.stat().st_uid != 0
    assert (machine.root / "etc" / "systemd" / "system" / "kuaishang.service").read_text() == (ROOT / unit).read_text()


def test_keys_users_and_switch(machine: Machine, installed: Path, env_file: Path) -> None:
    (machine.root / "root" / "served.db").unlink(missing_ok=True)
    assert machine.run("migrate")[0] == 0
    status, said = machine.run("keys", "status")
    assert (status, said.splitlines()[-1]) == (0, "All is under the first key.")
    status, said = machine.run("users", "list")
    assert (status, [json.loads(line)["role"] for line in said.splitlines() if line.startswith("{")]) == (0, []), said
    status, said = machine.run("users", "block", "12345")
    assert (status, said.splitlines()[-1]) == (1, "Error: There is no user 12345.")
    assert machine.run("switch", "off", "POST /api/v1/orders", "--reason", "a test")[0] == 0
    status, said = machine.run("switch", "list")
    assert (status, "POST /api/v1/orders: off since" in said, "a test" in said) == (0, True, True), said
    assert machine.run("switch", "on", "POST /api/v1/orders")[0] == 0
    status, said = machine.run("switch", "list")
    assert (status, said.splitlines()[-1]) == (0, "Nothing is switched off.")


def test_serve_without_settings_lists_them(machine: Machine, installed: Path, env_file: Path) -> None:
    env_file.write_text("")
    for words in (["serve"], []):
        status, said = machine.run(*words)
        assert status != 0
        assert "WECHAT_APP_ID: missing" in said
        assert "`kuaishang --help`" in said


class Load:
    """Users who read and order on connections that they keep."""

    def __init__(self, url: str, tokens: list[dict[str, str]]) -> None:
        self.url, self.failures, self.versions = url, [], Counter[str]()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._user, args=[token]) for token in tokens]
        for thread in self._threads:
            thread.start()

    def _user(self, token: dict[str, str]) -> None:
        with requests.Session() as session:
            session.headers.update(token)
            while not self._stop.is_set():
                for method, path, body, right in (
                    ("GET", "/api/v1/users/me", None, 200),
                    ("POST", "/api/v1/orders", {"items": [ITEM], "remark": "茶" * 100}, 201),
                    ("GET", "/version", None, 200),
                ):
                    try:
                        answer = session.request(method, f"{self.url}{path}", json=body, timeout=WAIT_SECONDS)
                        if answer.status_code != right:
                            self.failures.append(answer.text)
                        elif path == "/version":
                            self.versions[answer.json()["data"]["version"]] += 1
                    except requests.RequestException as error:
                        self.failures.append(repr(error))
                    time.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def migration(body: str) -> dict[str, str]:
    """Return the source of one more revision, for `variant`."""
    lines = ["import sqlalchemy as sa", "from alembic import op", 'revision = "0008"', 'down_revision = "0007"']
    source = "\n".join([*lines, "def upgrade():", f"    {body}"])
    return {"storage/migrations/versions/0008_more": source}


def columns_of_orders(machine: Machine) -> set[str]:
    with closing(sqlite3.connect(machine.root / "root" / "served.db")) as database:
        return {row[1] for row in database.execute("PRAGMA table_info(orders)")}


def gauge(url: str, name: str) -> float:
    metrics = requests.get(f"{url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text
    return float(re.search(rf"^kuaishang_{name} (\S+)$", metrics, re.MULTILINE)[1])  # type: ignore[index]


def version(url: str) -> Any:
    return requests.get(f"{url}/version", timeout=WAIT_SECONDS).json()["data"]["version"]


def replace(installed: Path, content: bytes) -> None:
    draft = installed.with_name("kuaishang.new")
    draft.write_bytes(content)
    draft.chmod(0o755)
    draft.replace(installed)


def url_of(env_file: Path) -> str:
    return f"http://127.0.0.1:{dict(line.split('=', 1) for line in env_file.read_text().splitlines())['PORT']}"


@pytest.fixture
def first_start(machine: Machine, installed: Path, built: Path, env_file: Path) -> None:
    """As if nothing had served yet."""
    replace(installed, built.read_bytes())
    for kept in (machine.root / "root" / ".cache" / "kuaishang").glob("served-*"):
        shutil.rmtree(kept)
    assert machine.run("migrate")[0] == 0


@pytest.mark.usefixtures("first_start")
def test_a_file_that_replaces_another_serves_and_no_request_fails(
    machine: Machine, installed: Path, env_file: Path, demo: Demo, built: Path, tmp_path: Path
) -> None:
    """And one that cannot serve does not, whatever is wrong with it."""
    whole = built.read_bytes()
    wrong_machine = bytearray(whole)
    struct.pack_into("<H", wrong_machine, 18, 0xF3)  # RISC-V
    broken = {
        "half copied": whole[: len(whole) // 2],
        "damaged": whole[:-5_000_000] + bytes([whole[-5_000_000] ^ 1]) + whole[-4_999_999:],
        "of another architecture": bytes(wrong_machine),
        "no program": b"<html>404</html>",
        "another program": b"#!/bin/sh\necho hello\n",
        "crashes": variant(built, tmp_path / "tree", wsgi="raise RuntimeError('on purpose')"),
        "fails": variant(built, tmp_path / "tree", wsgi="app.wsgi_app = None"),
        "takes a column away": variant(built, tmp_path / "tree", **migration('op.drop_column("orders", "remark")')),
        "hangs": variant(built, tmp_path / "tree", wsgi="import time; time.sleep(1000)"),
    }
    add = 'op.add_column("orders", sa.Column("note", sa.String(9)))'
    next_one = variant(built, tmp_path / "tree", version="9.9.9", **migration(add))
    url = url_of(env_file)
    serving = Running(machine, "serve", WATCH_SECONDS="3", START_SECONDS="20")
    try:
        serving.wait_for('"serving"')
        load = Load(url, [log_in(url, demo.simulator) for _ in range(4)])
        try:
            old = version(url)
            for what, content in broken.items():
                replace(installed, content)
                refused = serving.printed().count("upgrade refused")
                serving.process.send_signal(signal.SIGHUP)
                serving.wait_for("upgrade refused", refused + 1)
                assert version(url) == old, what
                assert gauge(url, "reload_refused") == 1
            assert "remark" in columns_of_orders(machine)
            replace(installed, next_one)
            serving.process.send_signal(signal.SIGHUP)
            serving.wait_for("patch: done")
            assert {version(url) for _ in range(20)} == {"9.9.9"}
            assert gauge(url, "reload_refused") == 0
            assert "note" in columns_of_orders(machine)
            replace(installed, whole)  # and back
            serving.process.send_signal(signal.SIGHUP)
            serving.wait_for("rollback: done")
            wait_until(lambda: {version(url) for _ in range(20)} == {old})  # the last worker ends its requests
        finally:
            load.stop()
        assert load.failures == []
        assert load.versions.keys() == {old, "9.9.9"}
    finally:
        serving.stop()


@pytest.mark.usefixtures("first_start")
def test_a_start_after_a_refusal_serves_the_last_file_that_proved_itself(
    machine: Machine, installed: Path, env_file: Path, demo: Demo, built: Path, tmp_path: Path
) -> None:
    whole, url = built.read_bytes(), url_of(env_file)
    crashes = variant(built, tmp_path / "tree", wsgi="raise RuntimeError('on purpose')")
    # Not where it is checked; then it would be refused.
    dies = variant(
        built,
        tmp_path / "tree",
        version="6.6.6",
        wsgi="import os, gevent\n'SUPERVISOR_PIPE' in os.environ and gevent.spawn_later(3, os._exit, 1)",
    )
    asks = variant(
        built,
        tmp_path / "tree",
        version="7.7.7",
        settings="raise SettingsError('a setting is missing')",
    )
    next_one = variant(built, tmp_path / "tree", version="9.9.9")

    @contextmanager
    def started() -> Iterator[Running]:
        serving = Running(machine, "serve", WATCH_SECONDS="4", START_SECONDS="20")
        try:
            serving.wait_for('"serving"')
            yield serving
        finally:
            serving.stop()

    fallback = "serving the last file that proved itself, not the one at the path"
    with started() as serving:
        old = version(url)
        replace(installed, whole[: len(whole) // 2])
        serving.process.send_signal(signal.SIGHUP)
        serving.wait_for("upgrade refused")
    for content in (whole[: len(whole) // 2], crashes, asks):
        replace(installed, content)
        with started() as serving:
            assert version(url) == old
            assert fallback in serving.printed()

    replace(installed, next_one)
    with started() as serving:  # which was replaced while nothing served, so on purpose
        assert version(url) == "9.9.9"
        assert fallback not in serving.printed()
        (home,) = (machine.root / "root" / ".cache" / "kuaishang").glob("served-*")
        wait_until(lambda: not (home / "unproved").exists())
    with started() as serving:
        assert version(url) == "9.9.9"
        replace(installed, dies)
        serving.process.send_signal(signal.SIGHUP)
        serving.wait_for('"patch: ')  # it went back, or was refused if that took longer
        wait_until(lambda: {version(url) for _ in range(20)} == {"9.9.9"})
    with started() as serving:
        assert version(url) == "9.9.9"
        assert "was tried before" in serving.printed()
