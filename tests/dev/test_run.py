"""`make run`, as a developer at a keyboard sees it."""

import io
import json
import os
import pty
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from dev import run
from dev.redis_server import executable
from dev.run import banner
from tests.dev.launched import Launch, Launched
from tests.harness import ROOT, WAIT_SECONDS, bound_to_this_process, free_port, migrate, suspend, wait_until

PROXY = {"http_proxy": "http://127.0.0.1:9"}
REDIS = Path(executable()).name
"""redis-server, or from Python 3.13 on valkey-server."""


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
    assert all(everyday.family(part) for part in (REDIS, "dev.wechat_simulator"))
    assert everyday.family("dev.reload")[0].environ()["DRAIN_SECONDS"] == "0"


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
    ):
        with ExitStack() as stack, pytest.raises(SystemExit) as caught:
            run.launch(tmp_path, dict(env), stack)
        assert str(caught.value).startswith("make run: ")
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_launch_ends_if_the_database_cannot_be_migrated(
    launch: Launch, environ: dict[str, str], tmp_path: Path
) -> None:
    unknown = f"sqlite:///{tmp_path}/unknown.db"
    migrate(unknown)
    with closing(sqlite3.connect(tmp_path / "unknown.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '0001'")
    for url, reason in (("sqlite:////no/such/folder/x.db", "unable to open"), (unknown, "Can't locate revision")):
        launched = launch(**{**environ, "DATABASE_URL": url})
        assert launched.popen.wait(WAIT_SECONDS) == 1
        lines = launched.on_stderr().splitlines()
        assert re.fullmatch(rf"make run: the database cannot be migrated: storage/.*\.py:\d+: .*{reason}.*", lines[0])
        assert lines[1:] == ["make run: nothing serves", "make run: the service did not start; see its output above"]


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
            with suppress(psutil.NoSuchProcess):  # the service ends by itself
                process.kill()
        psutil.wait_procs(left_behind)
    assert (everyday.var / "secrets.env").stat().st_mode & 0o777 == 0o600
    everyday.start_again()
    assert everyday.me(headers) == me


def test_stand_ins_that_die_are_started_again_where_they_were(everyday: Launched) -> None:
    headers = everyday.log_in()
    me = everyday.me(headers)
    for name, part in (("Redis", REDIS), ("the WeChat simulator", "dev.wechat_simulator")):
        (process,) = everyday.family(part)
        process.kill()
        wait_until(lambda: f"make run: {name} has died; starting it again\n" in everyday.printed())  # noqa: B023
        wait_until(lambda: [other for other in everyday.family(part) if other != process])  # noqa: B023
    wait_until(lambda: requests.get(f"{everyday.url}/readyz", timeout=WAIT_SECONDS).ok)
    assert everyday.me(headers) == me
    assert everyday.me(everyday.log_in()) != me


def test_settings_of_the_environment_are_used_and_several_run_side_by_side(
    everyday: Launched, launch: Launch, environ: dict[str, str]
) -> None:
    """The other one has stores and secrets of its own, and prints JSON."""
    chosen = {name: environ[name] for name in ("REDIS_URL", "DATABASE_URL", "ENCRYPTION_KEYS")}
    chosen |= {"DRAIN_SECONDS": "1", "LOG_FORMAT": "json"}
    other = launch(str(everyday.var), **chosen).ready()
    assert not other.family(REDIS)
    assert other.family("simulator")
    used = other.family("dev.reload")[0].environ()
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

    port = str(free_port())
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

    part = run.Part("a poem", ["this"], dict(os.environ), "http://unused", read=read_late)
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
