"""`make run`, as a developer at a keyboard sees it."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from dev import run
from dev.run import banner, free_port
from tests.harness import ROOT, WAIT_SECONDS, Process, bearer, bound_to_this_process, migrate, suspend, wait_until

PROXY = {"http_proxy": "http://127.0.0.1:9"}


class Launched(Process):
    """A launcher with a folder and a port of its own."""

    def __init__(self, var: Path, output: Path, root: Path = ROOT, **env: str) -> None:
        self.var = var
        self.output = output
        self.port = env.get("PORT") or str(free_port("PORT", "0"))
        self.url = f"http://127.0.0.1:{self.port}"
        env = {"PATH": os.environ["PATH"], "PORT": self.port, "WEB_CONCURRENCY": "1", **env}
        self._start = partial(
            super().__init__, ["dev.run", "--var", str(var)], env, root=root, last_signal=signal.SIGTERM
        )
        self._start(output)

    def crash(self) -> list[psutil.Process]:
        """Kill it, and return what it leaves behind."""
        left_behind = self.family()
        self.popen.kill()
        self.popen.wait()
        return left_behind

    def start_again(self) -> None:
        self.output = self.output.with_name("output-again")
        self._start(self.output)
        self.ready()

    def printed(self) -> str:
        return self.on_stdout() + self.output.with_suffix(".errors").read_text()

    def on_stdout(self) -> str:
        return self.output.read_text()

    def kept(self) -> str:
        """The log file."""
        return (self.var / "log" / f"{self.port}.jsonl").read_text()

    def ready(self) -> "Launched":
        wait_until(lambda: "Ctrl-C stops everything" in self.printed() or self.popen.poll() is not None)
        assert self.popen.poll() is None, self.printed()
        return self

    def simulator_url(self) -> str:
        return re.findall(r"WeChat +(http://\S+)", self.printed())[0]

    def log_in(self) -> dict[str, str]:
        """Log in as a new user, and return the headers that say so."""
        code = requests.post(f"{self.simulator_url()}/simulator/codes", timeout=WAIT_SECONDS).json()["code"]
        login = requests.post(f"{self.url}/api/v1/auth/wechat", json={"code": code}, timeout=WAIT_SECONDS)
        return bearer(login.json()["data"]["token"])

    def me(self, headers: dict[str, str]) -> dict[str, str]:
        return requests.get(f"{self.url}/api/v1/users/me", headers=headers, timeout=WAIT_SECONDS).json()["data"]

    def request_trace_id(self) -> str:
        """Send a request, and return its trace id."""
        return requests.get(f"{self.url}/version", timeout=WAIT_SECONDS).headers["X-Trace-Id"]

    def family(self, word: str = "") -> list[psutil.Process]:
        """The processes that it started and whose command holds this word."""
        processes = psutil.Process(self.popen.pid).children(recursive=True)
        return [process for process in processes if word in " ".join(process.cmdline())]

    def end(self) -> None:
        if self.popen.poll() is None:
            self.stop()

    def end_by(self, number: signal.Signals) -> None:
        """Send a signal; nothing is left of what it started, and nothing failed."""
        family = self.family()
        self.popen.send_signal(number)
        assert self.popen.wait(WAIT_SECONDS) == 0
        assert psutil.wait_procs(family, timeout=WAIT_SECONDS)[1] == []
        for port in re.findall(r"http://127\.0\.0\.1:(\d+)\n", self.printed()):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", int(port))) != 0
        assert re.findall("Traceback|exceptionType=", self.printed()) == []


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with ExitStack() as stack:
        count = iter(range(10))

        def start(var: str = "var", root: Path = ROOT, **env: str) -> Launched:
            launched = Launched(tmp_path / var, tmp_path / f"output-{next(count)}", root, **env)
            stack.callback(launched.end)
            return launched

        yield start


@pytest.fixture(scope="module")
def everyday(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """With nothing configured, on a machine that reaches the internet through a proxy."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "var").mkdir(mode=0o755)  # as an earlier version made it
    launched = Launched(folder / "var", folder / "output", **PROXY)
    try:
        yield launched.ready()
        launched.end_by(signal.SIGINT)
    finally:
        launched.kill()


def reachable(host: str, url: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.connect_ex((host, urlsplit(url).port)) == 0


@pytest.mark.parametrize(("host", "others"), [("127.0.0.2", ["127.0.0.1"]), ("::1", ["127.0.0.1"]), ("::", [])])
def test_host_is_where_the_service_listens_and_nothing_else(launch: Launch, host: str, others: list[str]) -> None:
    launched = launch(HOST=host, **PROXY).ready()
    (url,) = re.findall(r"API +(http://\S+)", launched.printed())
    assert requests.get(f"{url}/livez", timeout=WAIT_SECONDS).ok
    assert [other for other in others if reachable(other, url)] == []
    if host == "::":
        assert reachable("127.0.0.2", url)
    for elsewhere in {host, "127.0.0.2", "::1"} - {"::"}:
        assert not reachable(elsewhere, launched.simulator_url()), elsewhere
    assert reachable("127.0.0.1", launched.simulator_url())


def test_nothing_that_is_kept_is_readable_by_others(everyday: Launched) -> None:
    kept = [everyday.var, *everyday.var.rglob("*")]
    assert {"secrets.env", "kuaishang.db", "log", "redis"} <= {path.name for path in kept}
    assert [path for path in kept if path.stat().st_mode & 0o077] == []


def test_by_default_nothing_listens_on_another_address(everyday: Launched) -> None:
    for url in (everyday.url, everyday.simulator_url()):
        assert reachable("127.0.0.1", url)
        assert not reachable("127.0.0.2", url)


def test_the_log_says_that_the_simulator_does_not_know_a_code_of_devtools(everyday: Launched) -> None:
    login = requests.post(f"{everyday.url}/api/v1/auth/wechat", json={"code": "0devtools"}, timeout=WAIT_SECONDS)
    assert login.json()["code"] == 460
    wait_until(lambda: "WECHAT_APP_ID and WECHAT_APP_SECRET" in everyday.on_stdout())
    (line,) = (line for line in everyday.on_stdout().splitlines() if "WeChat call failed" in line)
    assert "this is the WeChat simulator, which knows only its own codes" in line


def test_the_printed_login_works(everyday: Launched) -> None:
    pasted = everyday.printed().partition("in another terminal:")[2].split("\n{")[0]
    assert "\nexport no_proxy=127.0.0.1\n" in pasted
    env = {"PATH": os.environ["PATH"], **PROXY}
    shell = subprocess.run(["bash", "-euc", pasted], capture_output=True, text=True, env=env, timeout=WAIT_SECONDS)
    login, me = shell.stdout.splitlines()
    assert '"code":200' in login
    assert '"token":"' in login
    assert '"code":200' in me
    assert '"role":"user"' in me


def test_the_service_and_the_simulator_know_each_other(everyday: Launched) -> None:
    simulator_url = everyday.simulator_url()
    assert requests.post(f"{simulator_url}/simulator/push/verify", timeout=WAIT_SECONDS).json()["verified"]
    message = {"message": {"MsgType": "text"}}
    pushed = requests.post(f"{simulator_url}/simulator/push", json=message, timeout=WAIT_SECONDS).json()
    assert [answer["body"] for answer in pushed["answers"]] == ["success"]
    (web_login,) = re.findall(r"Web login +(http://\S+)", everyday.printed())
    away = requests.get(web_login, timeout=WAIT_SECONDS, allow_redirects=False)
    assert away.headers["Location"].startswith(f"{simulator_url}/connect/qrconnect?")


def test_stand_ins_run_and_a_stop_is_not_delayed(everyday: Launched) -> None:
    assert all(everyday.family(part) for part in ("redis-server", "dev.wechat_simulator"))
    assert everyday.family("gunicorn")[0].environ()["DRAIN_SECONDS"] == "0"


def test_log_lines_are_printed_for_people_and_kept_unchanged(everyday: Launched) -> None:
    trace_id = everyday.request_trace_id()
    wait_until(lambda: trace_id in everyday.kept() and trace_id[:8] in everyday.printed())
    (line,) = [json.loads(line) for line in everyday.kept().splitlines() if trace_id in line]
    assert (line["message"], line["status"]) == ("request", 200)
    (shown,) = [row for row in everyday.printed().splitlines() if trace_id[:8] in row]
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d\.\d{{3}} INFO    {trace_id[:8]} request method=GET route=/version status=200 .*", shown
    )


def test_a_launcher_that_hangs_delays_no_request(everyday: Launched) -> None:
    everyday.request_trace_id()
    suspend(everyday.popen)
    try:
        with requests.Session() as session:  # far more lines than the pipe holds
            url = f"{everyday.url}/version"
            ids = [session.get(url, timeout=WAIT_SECONDS).headers["X-Trace-Id"] for _ in range(500)]
    finally:
        everyday.popen.send_signal(signal.SIGCONT)
    wait_until(lambda: ids[-1] in everyday.kept())
    assert [trace_id for trace_id in ids if trace_id not in everyday.kept()] == []


def test_invalid_settings_are_reported_in_one_line(everyday: Launched, environ: dict[str, str], tmp_path: Path) -> None:
    # With this database no launch succeeds.
    stores = {"PORT": "0", "REDIS_URL": environ["REDIS_URL"], "DATABASE_URL": "sqlite:////no/such/folder/x.db"}
    newer = f"sqlite:///{tmp_path}/newer.db"
    migrate(newer)
    with closing(sqlite3.connect(tmp_path / "newer.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    for env, line in (
        ({"PORT": everyday.port}, f"port {everyday.port} cannot be used"),
        ({**stores, "SIMULATOR_PORT": everyday.port}, "set SIMULATOR_PORT to another port"),
        *(({"PORT": port}, f"PORT={port} is not a port number") for port in ("-1", "70000", "80.5", "eighty")),
        ({"HOST": "192.0.2.99"}, "or HOST to an address of this machine"),
        ({"LOG_FORMAT": "xml"}, "LOG_FORMAT=xml is neither text nor json"),
        (
            {**stores, "WECHAT_API_BASE_URL": "https://api.weixin.qq.com"},
            "WECHAT_API_BASE_URL is set and WECHAT_APP_ID is not",
        ),
        ({**environ, **stores}, "the database cannot be migrated"),
        ({**environ, **stores, "DATABASE_URL": newer}, "cannot be migrated: FAILED: Can't locate revision"),
    ):
        with ExitStack() as stack, pytest.raises(SystemExit) as caught:
            run.launch(tmp_path, dict(env), stack)
        assert str(caught.value).startswith("make run: ")
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)


def test_data_is_locked_while_its_redis_runs_and_survives_a_crash(everyday: Launched, launch: Launch) -> None:
    headers = everyday.log_in()
    me = everyday.me(headers)
    left_behind = everyday.crash()
    try:
        late = launch(str(everyday.var))
        assert late.popen.wait(WAIT_SECONDS) == 1
        (line,) = late.printed().splitlines()
        assert "is in use" in line
    finally:
        for process in left_behind:
            process.kill()
        psutil.wait_procs(left_behind)
    assert (everyday.var / "secrets.env").stat().st_mode & 0o777 == 0o600
    everyday.start_again()
    assert everyday.me(headers) == me


def test_settings_of_the_environment_are_used_and_several_run_side_by_side(
    everyday: Launched, launch: Launch, environ: dict[str, str]
) -> None:
    """The other one has stores and secrets of its own, and prints JSON."""
    chosen = {name: environ[name] for name in ("REDIS_URL", "DATABASE_URL", "ENCRYPTION_KEYS")}
    chosen |= {"DRAIN_SECONDS": "1", "LOG_FORMAT": "json"}
    other = launch(str(everyday.var), **chosen).ready()
    assert not other.family("redis-server")
    assert other.family("simulator")
    used = other.family("gunicorn")[0].environ()
    kept = dict(line.split("=", 1) for line in (other.var / "secrets.env").read_text().splitlines())
    assert {name: used[name] for name in chosen} == chosen
    assert used["SECRET_KEY"] == kept["SECRET_KEY"]
    both = (everyday, other)
    ids = [launched.request_trace_id() for launched in both]
    other.end_by(signal.SIGHUP)
    wait_until(lambda: ids[0] in everyday.kept())
    assert [[trace_id in it.kept() for trace_id in ids] for it in both] == [[True, False], [False, True]]
    assert "{" not in everyday.on_stdout()
    assert other.on_stdout() == other.kept()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the project, whose code may be changed."""
    ignore = shutil.ignore_patterns(".git", ".venv", "var", ".*_cache")
    return Path(shutil.copytree(ROOT, tmp_path / "clone", ignore=ignore))


LAST_WORDS = """
import atexit, logging, os, sys
def say_goodbye():
    logging.shutdown()  # what is still queued, before these and not among them
    for number in range(2000):
        sys.stdout.write('{"message": "goodbye %d %s"}\\n' % (number, "x" * 100))
    sys.stdout.write("in the middle of a")
    sys.stdout.flush()
atexit.register(say_goodbye)
"""


def replace(path: Path, text: str) -> None:
    """Change a file in one step: a launcher that sees two restarts the service twice."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


def test_changed_code_is_reloaded_mistakes_are_survived_and_no_line_is_lost(
    launch: Launch, clone: Path, environ: dict[str, str]
) -> None:
    """Each start ends with more than a pipe holds, and in the middle of a line."""
    source = clone / "wsgi.py"
    source.write_text(LAST_WORDS + source.read_text())
    launcher = clone / "dev" / "run.py"  # on a busy machine an orderly end takes longer than it is given
    patient = launcher.read_text().replace("STOP_SECONDS = 5", "STOP_SECONDS = 60")
    launcher.write_text(patient.replace('"--graceful-timeout", "1"', '"--graceful-timeout", "60"'))
    launched = launch(root=clone, **environ).ready()
    (clone / ".#settings.py").symlink_to("somebody@somewhere.1:2")  # how Emacs marks what it edits
    settings, health = clone / "settings.py", clone / "blueprints" / "health.py"
    original = health.read_text()
    ids = [launched.request_trace_id() for _ in range(20)]

    os.utime(clone / "errors.py", (2**31, 2**31))  # from a machine whose clock is ahead
    replace(settings, settings.read_text().replace("VERSION = ", "VERSION = 'patched' + "))
    wait_until(lambda: "patched" in read_version(launched))
    ids += [launched.request_trace_id() for _ in range(20)]
    for number, mistake in enumerate(("this is no python", "import no_such_module"), 1):
        replace(health, f"{original}\n{mistake}\n")
        wait_until(lambda: launched.printed().count("It restarts when a file changes.") == number)  # noqa: B023
        assert not read_version(launched)
    replace(health, original)
    wait_until(lambda: "patched" in read_version(launched))
    ids += [launched.request_trace_id() for _ in range(20)]
    launched.popen.send_signal(signal.SIGQUIT)
    assert launched.popen.wait(WAIT_SECONDS) == 0
    for text in (launched.kept(), launched.printed()):
        assert [trace_id for trace_id in ids if trace_id[:8] not in text] == []
        goodbyes = [match for line in text.splitlines() if (match := re.search(r"goodbye (\d+) x{100}(?:\"}|)$", line))]
        assert [int(match[1]) for match in goodbyes] == list(range(2000)) * 5
        assert text.splitlines().count("in the middle of a") == 3  # after a mistake, gunicorn goes on in that line
    assert all(line.startswith(("{", "in the middle of a")) for line in launched.kept().splitlines())


def read_version(launched: Launched) -> str:
    """The response; empty if there is none."""
    try:
        return requests.get(f"{launched.url}/version", timeout=WAIT_SECONDS).text
    except requests.RequestException:
        return ""


def test_passwords_are_not_printed() -> None:
    printed = banner(
        "http://x",
        None,
        "redis://user:pass@word@host:6379/0",
        "mysql://user:word@host/kuaishang?password=word",
        Path("x"),
    )
    assert "redis://host:6379/0" in printed
    assert "mysql://host/kuaishang" in printed
    assert "word" not in printed


def test_a_terminal_shows_colours_and_lines_are_kept_after_it_is_gone(tmp_path: Path, environ: dict[str, str]) -> None:
    """With everything configured."""
    master, slave = pty.openpty()
    shown = bytearray()

    def is_shown(words: bytes) -> bool:
        if select.select([master], [], [], 0)[0]:
            shown.extend(os.read(master, 65536))
        return words in shown

    port = str(free_port("PORT", "0"))
    url, kept = f"http://127.0.0.1:{port}/version", tmp_path / "log" / f"{port}.jsonl"
    command = [*bound_to_this_process(signal.SIGTERM), sys.executable, "-m", "dev.run", "--var", str(tmp_path)]
    env = {"PATH": os.environ["PATH"], **environ, "PORT": port, "WEB_CONCURRENCY": "1"}
    with os.fdopen(slave, "wb", buffering=0) as terminal:
        launcher = subprocess.Popen(command, cwd=ROOT, env=env, stdout=terminal, stderr=terminal)
    try:
        with os.fdopen(master):
            wait_until(lambda: is_shown(b"Ctrl-C stops everything"))
            family = psutil.Process(launcher.pid).children(recursive=True)
            assert not [process for process in family if "simulator" in " ".join(process.cmdline())]
            assert b"in another terminal" not in shown
            requests.get(url, timeout=WAIT_SECONDS)
            wait_until(lambda: is_shown(b"/version"))
            assert b"\x1b[32mINFO" in shown
        ids = [requests.get(url, timeout=WAIT_SECONDS).headers["X-Trace-Id"] for _ in range(5)]
        wait_until(lambda: all(trace_id in kept.read_text() for trace_id in ids))
    finally:
        launcher.terminate()
        launcher.wait(WAIT_SECONDS)


def test_stop_waits_until_the_last_lines_are_read() -> None:
    read = []

    def read_late(lines: IO[bytes]) -> None:
        time.sleep(0.2)
        with lines:
            read.append(lines.read())

    part = run.Part("a poem", ["this"], dict(os.environ), read=read_late)
    part.start()
    assert part.process
    part.process.wait(WAIT_SECONDS)
    part.stop()
    assert b"Namespaces are one honking great idea" in read[0]


def test_the_log_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOG_BYTES", 1000)
    kept = run.log_file(tmp_path / "log" / "8000.jsonl")
    lines = [f'{{"message": "{number:04}"}}\n'.encode() for number in range(1000)] + [b"\xff\n"]
    run.relay(io.BytesIO(b"".join(lines)), kept, str)
    kept.close()
    files = sorted((tmp_path / "log").iterdir(), reverse=True)
    assert len(files) == run.LOG_FILES
    assert all(file.stat().st_size <= 1000 for file in files)
    assert b"".join(lines).endswith(b"".join(file.read_bytes() for file in files))
