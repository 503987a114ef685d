"""The trial of a tree before a reload leaves no trace. Which trees it refuses, tests/test_reload.py says."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis

from dev.redis_server import RedisServer
from tests.deploy.patch.broken import CREATED, EACH_REQUEST, add
from tests.deploy.patch.server import copy_tree
from tests.harness import PUSH_TOKEN, WAIT_SECONDS


@pytest.fixture
def tree() -> Iterator[Path]:
    """The path of a socket in it must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield copy_tree(Path(folder, "tree"))


def try_out(tree: Path, environ: dict[str, str], serving: Any = ("127.0.0.1", 1)) -> subprocess.CompletedProcess[str]:
    bind = f"[{environ.get('HOST', '0.0.0.0')}]:{environ.get('PORT', 8000)}"
    command = [sys.executable, "-m", "deploy.patch.trial", repr(serving), bind]
    of_the_master = {"PROMETHEUS_MULTIPROC_DIR": f"{tree}/none", "GUNICORN_PID": "1", "GUNICORN_FD": "3"}
    env = {"ENV_FILE": os.devnull, **environ, "PATH": os.environ["PATH"], **of_the_master}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=WAIT_SECONDS)


def test_a_good_tree_passes_and_takes_no_message(tree: Path, environ: dict[str, str], own_redis: RedisServer) -> None:
    files = set(tree.iterdir())
    with Redis.from_url(own_redis.url) as redis:
        redis.xgroup_create("messages", "workers", "0", mkstream=True)
        redis.xadd("messages", {"sealed": "a message", "trace": "{}"})
        tried = try_out(tree, {**environ, "REDIS_URL": own_redis.url, "WECHAT_PUSH_TOKEN": PUSH_TOKEN})
        assert (tried.returncode, tried.stdout, tried.stderr) == (0, "", "")
        assert redis.xpending("messages", "workers")["pending"] == 0
        assert redis.xlen("messages") == 1
    assert {path for path in tree.iterdir() if path.name != "__pycache__"} == files


def test_it_counts_where_no_start_takes_it_for_a_crash(tree: Path, environ: dict[str, str]) -> None:
    say = "import os; at = os.environ['PROMETHEUS_MULTIPROC_DIR']; print(at, *os.listdir(at), file=open('at', 'w'))"
    add("wsgi.py", EACH_REQUEST.format(say), CREATED)(tree)
    assert try_out(tree, environ).returncode == 0
    directory, *counted = (tree / "at").read_text().split()
    assert counted
    assert Path(directory).parent.name.startswith("kuaishang-trial-")  # its files are in the folder that is removed
    assert Path(directory).parent.parent == tree


def test_what_a_broken_tree_has_started_ends_with_it(tree: Path, environ: dict[str, str]) -> None:
    started = ["sleep", f"{os.getpid()}000"]
    add("wsgi.py", f"import subprocess; subprocess.Popen({started})\nraise RuntimeError('broken')")(tree)
    tried = try_out(tree, environ)
    assert tried.returncode == 1
    assert "RuntimeError: broken" in tried.stderr
    assert [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == started] == []


@pytest.mark.parametrize("by_path", [True, False], ids=["by a path", "by a port"])
def test_what_serves_is_asked_whether_redis_is_away(
    tree: Path, environ: dict[str, str], tmp_path: Path, by_path: bool
) -> None:
    away = {**environ, "REDIS_URL": "redis://127.0.0.1:1"}
    with socket.socket(socket.AF_UNIX) if by_path else socket.socket() as serving:
        serving.bind(str(tmp_path / "socket") if by_path else ("127.0.0.1", 0))
        serving.listen()
        for status, passes in ((b"503", True), (b"200", False)):
            with ThreadPoolExecutor(1) as executor:
                tried = executor.submit(try_out, tree, away, serving.getsockname())
                serving.settimeout(WAIT_SECONDS)
                connection, _ = serving.accept()
                assert connection.recv(100).startswith(b"GET /readyz ")
                connection.sendall(b"HTTP/1.1 " + status + b" X\r\n\r\n")
                connection.close()
                assert (tried.result().returncode == 0) is passes
