"""The installation behind each target of the Makefile, as far as it needs no index."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dev import install
from dev.install import environment_of_uv

PINS = r"""
ruff==1.0 \
    --hash=sha256:00
    # via -r requirements-dev.in
setuptools==2.0 \
    --hash=sha256:11 \
    --hash=sha256:22
    # via -r requirements-dev.in
uv==3.0 \
    --hash=sha256:33
"""

Commands = list[tuple[str, ...]]
Install = Callable[..., tuple[object, Commands]]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Run it with commands that do nothing, of which some fail; return its status and the commands."""
    pins = tmp_path / "pins.txt"
    pins.write_text(PINS)
    monkeypatch.setattr(sys, "argv", ["install.py", "env", str(pins)])

    def run(*failing: str) -> tuple[object, Commands]:
        commands: Commands = []

        def call(command: list[str], **options: object) -> int:
            if "--only-binary" in command:
                command = [*command[:-1], Path(command[-1]).read_text()]
            commands.append(tuple(command))
            return int(any(word in " ".join(command) for word in failing))

        def run_command(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, call(command), stdout="")

        monkeypatch.setattr(install.subprocess, "call", call)
        monkeypatch.setattr(install.subprocess, "run", run_command)
        return install.main(), [command for command in commands if "config" not in command]

    return run


def test_pip_installs_uv_and_what_builds_by_their_hashes_and_uv_the_rest(installed: Install, tmp_path: Path) -> None:
    status, commands = installed()
    assert status == 0
    venv, first, rest = commands
    assert venv[1:] == ("-m", "venv", "--without-pip", "env")
    assert first[0] == sys.executable
    assert {"--require-hashes", "--no-deps", "--python", "env/bin/python"} <= set(first)
    assert first[-1].split() == [
        *("setuptools==2.0", "\\", "--hash=sha256:11", "\\", "--hash=sha256:22"),
        *("uv==3.0", "\\", "--hash=sha256:33"),
    ]
    assert rest[:4] == ("env/bin/python", "-m", "uv", "pip")
    assert {"--require-hashes", "--no-build-isolation", str(tmp_path / "pins.txt")} <= set(rest)


def test_pip_does_what_uv_cannot(installed: Install, tmp_path: Path) -> None:
    status, commands = installed("-m uv")
    assert status == 0
    assert commands[-1][:3] == (sys.executable, "-m", "pip")
    rest = ("--quiet", "--require-hashes", "-r", str(tmp_path / "pins.txt"), "--no-build-isolation")
    assert commands[-1][-5:] == rest
    assert commands[-2][-1].split() == ["setuptools==2.0", "\\", "--hash=sha256:11", "\\", "--hash=sha256:22"]


def test_pip_builds_as_ever_where_no_setuptools_is_pinned(installed: Install, tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text("ruff==1.0 --hash=sha256:00\n")
    _, commands = installed()
    assert commands[-1][-2:] == ("-r", str(tmp_path / "pins.txt"))


def test_an_environment_gets_its_own_pip_where_the_python_has_none(installed: Install) -> None:
    status, commands = installed(f"{sys.executable} -m pip")
    assert status == 0
    assert [command[:3] for command in commands[2:]] == [
        ("env/bin/python", "-m", "ensurepip"),
        ("env/bin/python", "-m", "pip"),
        ("env/bin/python", "-m", "uv"),
    ]
    assert "--python" not in commands[3]


def test_without_any_pip_it_says_what_to_install(installed: Install) -> None:
    status, commands = installed(f"{sys.executable} -m pip", "ensurepip")
    assert "install python3-pip or python3-venv" in str(status)
    assert commands[-1][2] == "ensurepip"


def test_a_failure_of_pip_is_a_failure(installed: Install) -> None:
    assert installed("-m uv", "install --quiet --require-hashes -r")[0] == 1


def test_uv_is_told_what_pip_is_configured_to() -> None:
    listed = """
:env:.cert='/ca of ours.pem'
global.cert='/another.pem'
global.constraint='/constraints.txt'
global.extra-index-url='\\nhttps://one.example/simple\\nhttps://two.example/simple'
global.find-links='/wheels /more'
global.index-url='https://global.example/simple'
global.no-index='1'
install.index-url='https://install.example/simple'
list.index-url='https://list.example/simple'
"""
    env = environment_of_uv(listed)
    assert (
        env.items()
        >= {
            "UV_DEFAULT_INDEX": "https://install.example/simple",
            "UV_INDEX": "https://one.example/simple https://two.example/simple",
            "UV_FIND_LINKS": "/wheels,/more",
            "UV_NO_INDEX": "1",
            "SSL_CERT_FILE": "/ca of ours.pem",
        }.items()
    )
    assert not {"constraint", "/constraints.txt"} & {*env, *env.values()}
    assert environment_of_uv("").keys() == {"UV_SYSTEM_CERTS", "UV_INDEX_STRATEGY"}


def test_uv_asks_the_index_of_pip() -> None:
    asked = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    with HTTPServer(("127.0.0.1", 0), Index) as index:
        threading.Thread(target=index.serve_forever, daemon=True).start()
        listed = f"global.index-url='http://127.0.0.1:{index.server_port}/simple'"
        command = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--no-cache", "--python", sys.executable]
        env = {**environment_of_uv(listed), "PATH": os.environ["PATH"], "no_proxy": "127.0.0.1"}
        done = subprocess.run([*command, "absent-package"], env=env, capture_output=True, text=True)
        index.shutdown()
    assert done.returncode != 0
    assert asked == ["/simple/absent-package/"]
