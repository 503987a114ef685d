"""`make run`, as somebody at a keyboard sees it."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import psutil
import pytest
import requests

from dev import run
from dev.run import banner, free_port
from tests.harness import ROOT, suspend, wait_until


class Launched:
    """A launcher with a folder, a port and a simulator's port of its own."""

    def __init__(self, var: Path, output: Path, root: Path = ROOT, **env: str) -> None:
        self.var = var
        self.port = env.get("PORT") or str(free_port("PORT", "0"))
        self.output = output
        with output.open("wb") as stdout, output.with_suffix(".errors").open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "dev.run", "--var", str(var)],
                cwd=root,
                env={"PATH": os.environ["PATH"], "PORT": self.port, "WEB_CONCURRENCY": "1", **env},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.printed() + self.output.with_suffix(".errors").read_text()

    def printed(self) -> str:
        """On stdout alone."""
        return self.output.read_text()

    def kept(self) -> list[str]:
        return (self.var / "log" / f"{self.port}.jsonl").read_text().splitlines()

    def ready(self) -> "Launched":
        wait_until(lambda: "Ctrl-C stops everything" in self.said() or self.popen.poll() is not None, 40)
        assert self.popen.poll() is None, self.said()
        return self

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
        self.popen.wait(30)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    with ExitStack() as stack:
        count = iter(range(10))

        def start(var: str = "var", **env: str) -> Launched:
            launched = Launched(tmp_path / var, tmp_path / f"said-{next(count)}", **env)
            stack.callback(launched.end)
            return launched

        yield start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_the_pasted_login_works_and_a_signal_stops_everything(
    launch: Callable[..., Launched], number: signal.Signals
) -> None:
    launched = launch(SIMULATOR_PORT=str(free_port("SIMULATOR_PORT", "0"))).ready()
    pasted = launched.said().partition("in another terminal:")[2].split("\n{")[0]
    shell = subprocess.run(
        ["bash", "-euc", pasted], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, timeout=30
    )
    login, me = shell.stdout.splitlines()
    assert '"code":200' in login
    assert '"token":"' in login
    assert '"code":200' in me
    assert '"role":"user"' in me

    family = launched.family()
    names = " ".join(" ".join(process.cmdline()) for process in family)
    assert all(part in names for part in ("redis-server", "dev.wechat_simulator", "gunicorn"))
    launched.popen.send_signal(number)
    assert launched.popen.wait(20) == 0
    assert psutil.wait_procs(family, timeout=1)[1] == []
    for port in re.findall(r"http://127\.0\.0\.1:(\d+)\n", launched.said()):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(port))) != 0
    assert re.findall("Traceback|exceptionType=", launched.said()) == []


def test_the_service_and_the_simulator_are_pointed_at_each_other(launch: Callable[..., Launched]) -> None:
    launched = launch().ready()
    simulator_url = re.search(r"WeChat +(http://\S+)", launched.said())
    web_login = re.search(r"Web login +(http://\S+)", launched.said())
    assert simulator_url
    assert web_login
    assert requests.post(f"{simulator_url[1]}/simulator/push/verify", timeout=5).json()["verified"]
    pushed = requests.post(f"{simulator_url[1]}/simulator/push", json={"message": {"MsgType": "text"}}, timeout=20)
    assert [answer["body"] for answer in pushed.json()["answers"]] == ["success"]
    away = requests.get(web_login[1], timeout=5, allow_redirects=False)
    assert away.headers["Location"].startswith(f"{simulator_url[1]}/connect/qrconnect?")


def test_sessions_users_and_secrets_outlive_a_restart(launch: Callable[..., Launched], tmp_path: Path) -> None:
    launched = launch().ready()
    url, simulator_url = re.findall(r"(?:API|WeChat) +(http://\S+)", launched.said())
    code = requests.post(f"{simulator_url}/simulator/codes", timeout=5).json()["code"]
    login = requests.post(f"{url}/api/v1/auth/wechat", json={"code": code}, timeout=5).json()["data"]
    launched.end()
    assert (tmp_path / "var" / "secrets.env").stat().st_mode & 0o777 == 0o600
    url = f"http://127.0.0.1:{launch().ready().port}"
    headers = {"Authorization": f"Bearer {login['token']}"}
    assert requests.get(f"{url}/api/v1/users/me", headers=headers, timeout=5).json()["data"] == login["user"]


def test_what_the_environment_sets_is_used_and_several_run_side_by_side(
    launch: Callable[..., Launched], environ: dict[str, str]
) -> None:
    stores = {name: environ[name] for name in ("REDIS_URL", "DATABASE_URL")}
    one, other = launch(**stores), launch(**stores)
    for launched in (one.ready(), other.ready()):
        assert not any("redis-server" in " ".join(process.cmdline()) for process in launched.family())
        assert requests.get(f"http://127.0.0.1:{launched.port}/readyz", timeout=5).status_code == 200
    account = {name: value for name, value in environ.items() if name.startswith("WECHAT_")}
    third = launch(**stores, **account).ready()
    assert not any("simulator" in " ".join(process.cmdline()) for process in third.family())
    assert "in another terminal" not in third.said()


def test_a_folder_in_use_and_a_port_that_is_taken_get_one_clear_line(launch: Callable[..., Launched]) -> None:
    launched = launch().ready()
    second = launch()
    assert second.popen.wait(20) == 1
    assert second.said().splitlines() == [second.said().strip()]
    assert "is in use" in second.said()
    both = str(free_port("PORT", "0"))
    for taken, port in (
        (launch("other-var", PORT=launched.port), launched.port),
        (launch("third-var", SIMULATOR_PORT=launched.port), launched.port),
        (launch("fourth-var", PORT=both, SIMULATOR_PORT=both), both),
    ):
        assert taken.popen.wait(20) == 1
        assert taken.said().splitlines() == [taken.said().strip()]
        assert f"port {port} cannot be used" in taken.said()


@pytest.mark.parametrize("port", ["eighty", "-1", "70000", "80.5"])
def test_what_is_no_port_gets_one_clear_line(launch: Callable[..., Launched], port: str) -> None:
    launched = launch(PORT=port)
    assert launched.popen.wait(20) == 1
    assert launched.said().strip() == f"make run: PORT={port} is no port number"


def test_half_an_account_is_not_taken_for_none(launch: Callable[..., Launched]) -> None:
    launched = launch(WECHAT_API_BASE_URL="https://api.weixin.qq.com")
    assert launched.popen.wait(20) == 1
    assert launched.said().count("\n") == 1
    assert "WECHAT_API_BASE_URL is set and WECHAT_APP_ID is not" in launched.said()


def test_a_proxy_to_the_internet_is_not_asked_for_what_is_on_this_machine(launch: Callable[..., Launched]) -> None:
    launched = launch(http_proxy="http://127.0.0.1:9").ready()
    assert "\nexport no_proxy=127.0.0.1\n" in launched.said()
    (simulator_url,) = re.findall(r"WeChat +(http://\S+)", launched.said())
    code = requests.post(f"{simulator_url}/simulator/codes", timeout=5).json()["code"]
    login = requests.post(f"http://127.0.0.1:{launched.port}/api/v1/auth/wechat", json={"code": code}, timeout=5)
    assert login.status_code == 200


def test_data_stays_locked_for_as_long_as_its_redis_runs(launch: Callable[..., Launched]) -> None:
    launched = launch().ready()
    left_behind = launched.family()
    launched.popen.kill()
    launched.popen.wait()
    try:
        second = launch()
        assert second.popen.wait(20) == 1
        assert "is in use" in second.said()
    finally:
        for process in left_behind:
            process.kill()
        psutil.wait_procs(left_behind)
    launch().ready()


def test_a_database_that_cannot_be_reached_gets_one_clear_line(launch: Callable[..., Launched], tmp_path: Path) -> None:
    launched = launch(DATABASE_URL=f"sqlite:///{tmp_path}/no/such/folder.db")
    assert launched.popen.wait(20) == 1
    assert launched.said().count("\n") == 1
    assert "cannot be migrated" in launched.said()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The project once more, in a folder where its code may be changed."""
    ignore = shutil.ignore_patterns(".git", ".venv", "var", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, tmp_path / "clone", ignore=ignore))


@pytest.mark.parametrize("mistake", ["this is no python", "import no_such_module"])
def test_changed_code_is_reloaded_and_a_mistake_is_survived(
    tmp_path: Path, clone: Path, environ: dict[str, str], mistake: str
) -> None:
    launched = Launched(tmp_path / "var", tmp_path / "said", root=clone, **environ)
    try:
        launched.ready()
        url = f"http://127.0.0.1:{launched.port}/version"
        source = clone / "settings.py"
        (clone / ".#settings.py").symlink_to("somebody@somewhere.1:2")  # how Emacs marks what it edits
        os.utime(clone / "errors.py", (2**31, 2**31))  # from a machine whose clock is ahead
        original = source.read_text()

        source.write_text(original.replace("VERSION = ", "VERSION = 'patched' + "))
        wait_until(lambda: "patched" in read(url), 20)
        source.write_text(original)
        source = clone / "blueprints" / "health.py"
        original = source.read_text()
        source.write_text(f"{original}\n{mistake}\n")
        wait_until(lambda: not read(url), 20)
        assert launched.popen.poll() is None
        source.write_text(original)
        wait_until(lambda: '"version"' in read(url) and "patched" not in read(url), 20)
    finally:
        launched.end()


def read(url: str) -> str:
    """What is answered there; nothing if nobody does."""
    try:
        return requests.get(url, timeout=5).text
    except requests.RequestException:
        return ""


def test_passwords_are_not_printed() -> None:
    said = banner(
        "http://x",
        None,
        "redis://user:pass@word@host:6379/0",
        "mysql://user:word@host/kuaishang?password=word",
        Path("x"),
    )
    assert "redis://host:6379/0" in said
    assert "mysql://host/kuaishang" in said
    assert "word" not in said


def test_the_secrets_of_the_environment_come_before_those_that_are_kept(
    launch: Callable[..., Launched], environ: dict[str, str], tmp_path: Path
) -> None:
    launched = launch(ENCRYPTION_KEYS=environ["ENCRYPTION_KEYS"]).ready()
    (service,) = [process for process in launched.family() if "gunicorn" in " ".join(process.cmdline())][:1]
    kept = dict(line.split("=", 1) for line in (tmp_path / "var" / "secrets.env").read_text().splitlines())
    assert service.environ()["ENCRYPTION_KEYS"] == environ["ENCRYPTION_KEYS"]
    assert service.environ()["SECRET_KEY"] == kept["SECRET_KEY"]


@pytest.mark.parametrize("chosen", [{}, {"DRAIN_SECONDS": "2"}])
def test_a_stop_is_not_announced_unless_somebody_wants_it_so(
    launch: Callable[..., Launched], chosen: dict[str, str]
) -> None:
    family = launch(**chosen).ready().family()
    service = next(process for process in family if "gunicorn" in " ".join(process.cmdline()))
    assert service.environ()["DRAIN_SECONDS"] == chosen.get("DRAIN_SECONDS", "0")


def test_log_lines_are_printed_readable_and_kept_as_they_are(launch: Callable[..., Launched]) -> None:
    launched = launch().ready()
    trace_id = requests.get(f"http://127.0.0.1:{launched.port}/version", timeout=5).headers["X-Trace-Id"]
    wait_until(lambda: trace_id in "".join(launched.kept()))
    (line,) = [json.loads(line) for line in launched.kept() if trace_id in line]
    assert (line["message"], line["status"]) == ("request", 200)
    launched.end()
    (shown,) = [row for row in launched.said().splitlines() if trace_id[:8] in row]
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d\.\d{{3}} INFO    {trace_id[:8]} request method=GET route=/version status=200 .*", shown
    )


def test_an_unknown_format_gets_one_clear_line(launch: Callable[..., Launched]) -> None:
    launched = launch(LOG_FORMAT="xml")
    assert launched.popen.wait(20) == 1
    assert launched.said() == "make run: LOG_FORMAT=xml is neither text nor json\n"


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_shows_colours_unless_they_are_declined(
    tmp_path: Path, environ: dict[str, str], env: dict[str, str]
) -> None:
    master, slave = pty.openpty()
    said = bytearray()

    def seen(words: bytes) -> bool:
        if select.select([master], [], [], 0)[0]:
            said.extend(os.read(master, 65536))
        return words in said

    with os.fdopen(slave, "wb", buffering=0) as terminal, os.fdopen(master):
        port = str(free_port("PORT", "0"))
        launcher = subprocess.Popen(
            [sys.executable, "-m", "dev.run", "--var", str(tmp_path / "var")],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **environ, "PORT": port, **env},
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        try:
            wait_until(lambda: seen(b"Ctrl-C stops everything"), 40)
            requests.get(f"http://127.0.0.1:{port}/version", timeout=5)
            wait_until(lambda: seen(b"/version"), 10)
        finally:
            launcher.terminate()
            launcher.wait(30)
    assert (b"\x1b[32mINFO" in said) is (not env)
    assert (b"\x1b" in said) is (not env)


def test_two_launchers_keep_their_lines_apart_and_one_prints_those_of_production(
    launch: Callable[..., Launched], environ: dict[str, str]
) -> None:
    stores = {name: environ[name] for name in ("REDIS_URL", "DATABASE_URL")}
    both = [launched.ready() for launched in [launch(**stores), launch(**stores, LOG_FORMAT="json")]]
    ids = [requests.get(f"http://127.0.0.1:{it.port}/version", timeout=5).headers["X-Trace-Id"] for it in both]
    for launched in both:
        launched.end()
    assert [[trace_id in "".join(launched.kept()) for trace_id in ids] for launched in both] == [
        [True, False],
        [False, True],
    ]
    assert "{" not in both[0].printed()
    assert both[1].printed().splitlines() == both[1].kept()


def test_no_line_is_lost_or_mixed_with_others_at_a_reload_or_at_the_end(
    tmp_path: Path, clone: Path, environ: dict[str, str]
) -> None:
    """Each start takes its leave with more than a pipe holds, and in the middle of a line."""
    last_words = """
import atexit, logging, os, sys
def say_goodbye():
    logging.shutdown()  # what is still queued, before these and not among them
    for number in range(2000):
        sys.stdout.write('{"message": "goodbye %d %s"}\\n' % (number, "x" * 100))
    sys.stdout.write("in the middle of a")
    sys.stdout.flush()
atexit.register(say_goodbye)
"""
    source = clone / "wsgi.py"
    source.write_text(last_words + source.read_text())
    launcher = clone / "dev" / "run.py"  # a second to take leave in is little on a busy machine
    launcher.write_text(launcher.read_text().replace('"--graceful-timeout", "1"', '"--graceful-timeout", "4"'))
    launched = Launched(tmp_path / "var", tmp_path / "said", root=clone, **{**environ, "WEB_CONCURRENCY": "1"})
    url = f"http://127.0.0.1:{launched.port}/version"
    ids, starts = [], 3
    try:
        launched.ready()
        for start in range(starts):
            ids += [requests.get(url, timeout=5).headers["X-Trace-Id"] for _ in range(20)]
            if start < starts - 1:
                gunicorn = [it for it in launched.family() if "gunicorn" in " ".join(it.cmdline())]
                os.utime(clone / "errors.py")
                assert psutil.wait_procs(gunicorn, timeout=20)[1] == []
                wait_until(lambda: read(url), 20)
    finally:
        launched.end()
    kept, said = launched.kept(), launched.said().splitlines()
    for lines in (kept, said):
        assert [trace_id for trace_id in ids if trace_id[:8] not in "\n".join(lines)] == []
        goodbyes = [match for line in lines if (match := re.search(r"goodbye (\d+) x{100}(?:\"}|)$", line))]
        assert [int(match[1]) for match in goodbyes] == list(range(2000)) * starts
    assert [line for line in kept if not line.startswith("{")] == ["in the middle of a"] * starts
    assert said.count("in the middle of a") == starts


def test_a_part_has_stopped_when_its_last_words_are_read() -> None:
    read = []

    def read_late(lines: IO[bytes]) -> None:
        time.sleep(0.5)
        with lines:
            read.append(lines.read())

    part = run.Part("a poem", ["this"], dict(os.environ), read=read_late)
    part.start()
    assert part.process
    part.process.wait(10)
    part.stop()
    assert b"Namespaces are one honking great idea" in read[0]


def test_a_launcher_that_stands_still_holds_up_no_request(launch: Callable[..., Launched]) -> None:
    launched = launch().ready()
    url = f"http://127.0.0.1:{launched.port}/version"
    requests.get(url, timeout=5)
    suspend(launched.popen)
    try:
        with requests.Session() as session:  # far more lines than the pipe holds
            ids = [session.get(url, timeout=5).headers["X-Trace-Id"] for _ in range(1000)]
    finally:
        launched.popen.send_signal(signal.SIGCONT)
    wait_until(lambda: ids[-1] in "".join(launched.kept()))
    kept = "".join(launched.kept())
    assert [trace_id for trace_id in ids if trace_id not in kept] == []


def test_lines_are_kept_where_nobody_reads_them_any_more(tmp_path: Path, environ: dict[str, str]) -> None:
    port = str(free_port("PORT", "0"))
    launcher = subprocess.Popen(
        [sys.executable, "-m", "dev.run", "--var", str(tmp_path)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ, "PORT": port},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert launcher.stdout
        assert launcher.stderr
        with launcher.stdout, launcher.stderr:
            next(line for line in launcher.stderr if b"Ctrl-C stops everything" in line)
        ids = [requests.get(f"http://127.0.0.1:{port}/version", timeout=5).headers["X-Trace-Id"] for _ in range(5)]
        kept = tmp_path / "log" / f"{port}.jsonl"
        wait_until(lambda: all(trace_id in kept.read_text() for trace_id in ids))
    finally:
        launcher.terminate()
        launcher.wait(30)


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOG_BYTES", 1000)
    kept = run.log_file(tmp_path / "log" / "8000.jsonl")
    lines = [f'{{"message": "{number:04}"}}\n'.encode() for number in range(1000)] + [b"\xff\n"]
    run.relay(io.BytesIO(b"".join(lines)), kept, str)
    kept.close()
    files = sorted((tmp_path / "log").iterdir(), reverse=True)
    assert len(files) == run.LOG_FILES
    assert all(file.stat().st_size <= 1000 for file in files)
    assert b"".join(lines).endswith(b"".join(file.read_bytes() for file in files))
