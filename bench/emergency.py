"""How long the steps of an emergency take, and what they cost: `make bench-patch`. Writes bench/emergency.md.

PEERS (a folder) adds the Gin service in its `gin_peer`, which needs Go and Debian's packages for Gin and redigo: what
Go does instead is build and restart.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import requests

from bench import GO
from tests.deploy.patch.broken import BROKEN
from tests.deploy.patch.server import Patched, copy_tree
from tests.faults.load import is_right, load
from tests.harness import ROOT, answers, free_port, wait_until

INTRODUCTION = """# An emergency, step by step

`make bench-patch` writes this table; all in one run, on a machine of {cores} cores. The service is under load,
from clients that read, log in and order on connections that they keep. The seconds of a patch or a rollback are those
of the command, without the watch that follows; in brackets, those after the check and the migration.

| step | seconds | requests | failed |
|---|---|---|---|
"""


class Row(NamedTuple):
    step: str
    seconds: str
    requests: int | str = "–"
    failed: int | str = "–"


def main() -> None:
    rows = [first_answer(), development()]
    with ExitStack() as stack:
        rows += production(Patched(stack))
    if os.environ.get("PEERS"):
        rows += gin(Path(os.environ["PEERS"]).resolve() / "gin_peer")
    table = "".join(f"| {row.step} | {row.seconds} | {row.requests} | {row.failed} |\n" for row in rows)
    (ROOT / "bench" / "emergency.md").write_text(INTRODUCTION.format(cores=os.cpu_count()) + table)
    print(table)
    sys.exit(any(row.failed not in (0, "–") for row in rows if "Gin" not in row.step))


def first_answer() -> Row:
    """From a clone to the first answer of `make run`, with nothing installed and nothing cached."""
    with tempfile.TemporaryDirectory() as folder:
        began, port = time.monotonic(), free_port()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), f"{folder}/clone"], check=True)
        environ = {**os.environ, "HOME": folder, "PORT": str(port), "XDG_CACHE_HOME": f"{folder}/cache"}
        with subprocess.Popen(
            ["make", "run"], cwd=f"{folder}/clone", env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            try:
                wait_until(lambda: answers(f"http://127.0.0.1:{port}/livez"), 300)
                seconds = time.monotonic() - began
            finally:
                running.terminate()
    return Row("clone, `make run`, first answer (nothing cached)", f"{seconds:.1f}")


def development() -> Row:
    said = subprocess.run([sys.executable, "-m", "bench.reload"], cwd=ROOT, capture_output=True, text=True).stdout
    [median] = re.findall(r"first response of the new code: median ([\d.]+) s", said)
    [failed] = re.findall(r"failed requests: (\d+)", said)
    return Row("save, live under `make run` (median of 20)", median, "–", int(failed))


def production(stage: Patched) -> Iterator[Row]:
    server = stage.server
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder, "tree"))

        def run(step: str, status: int, *words: str) -> Row:
            with load(stage) as running:
                began = time.monotonic()
                done = server.tool(*words)
                seconds = time.monotonic() - began
                time.sleep(2)
            assert done.returncode == status, done.stdout + done.stderr
            took_over = re.findall(r"([\d.]+) s  (?:starts|serves)", done.stdout)
            inside = f" ({sum(map(float, took_over)):.1f})" if len(took_over) > 1 else ""
            failed = sum(not is_right(outcome) for outcome in running.outcomes)
            return Row(step, f"{seconds:.1f}{inside}", len(running.outcomes), failed)

        (tree / "blueprints/orders.py").open("a").write("# patched\n")
        yield run("`make patch`, live in production", 0, "patch", str(tree), "--watch", "0")
        yield run("`make rollback`", 0, "rollback")
        for what in ("a syntax error", "a crash on each request", "a hang at the start"):
            broken = copy_tree(Path(folder, what))
            BROKEN[what][0](broken)
            yield run(f"`make patch` with {what}: refused", 1, "patch", str(broken), "--watch", "0")


def gin(source: Path) -> Iterator[Row]:
    """What Go does: build, stop, start."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(source, Path(folder, "gin")))
        port, environ = free_port(), {**os.environ, **GO, "GOCACHE": f"{folder}/cache"}
        environ |= {"BIND": f"127.0.0.1:{port}", "REDIS_ADDR": "127.0.0.1:1"}

        def build() -> float:
            began = time.monotonic()
            subprocess.run(["go", "build", "-o", "peer", "main.go"], cwd=tree, env=environ, check=True)
            return time.monotonic() - began

        def start() -> subprocess.Popen[bytes]:
            process = subprocess.Popen([tree / "peer"], env=environ, stdout=subprocess.DEVNULL)
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthz"))
            return process

        yield Row("Gin: first build", f"{build():.1f}")
        process = start()
        with asking(f"http://127.0.0.1:{port}/healthz") as counted:
            began = time.monotonic()
            text = (tree / "main.go").read_text()
            (tree / "main.go").write_text(text.replace('"Success"', '"Patched"'))
            build()
            process.terminate()
            process.wait()
            process = start()
            seconds = time.monotonic() - began
            time.sleep(1)
        process.terminate()
        process.wait()
        yield Row("Gin: edit, build, restart", f"{seconds:.1f}", *counted())


@contextmanager
def asking(url: str, clients: int = 8, pause: float = 0.03) -> Iterator[Callable[[], tuple[int, int]]]:
    """Ask on as many kept connections as the load on the service has; yields a function that counts."""
    over, outcomes = threading.Event(), list[bool]()

    def ask() -> None:
        with requests.Session() as session:
            while not over.is_set():
                try:
                    outcomes.append(session.get(url, timeout=10).ok)
                except requests.RequestException:
                    outcomes.append(False)
                time.sleep(pause)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: (len(outcomes), outcomes.count(False))
    finally:
        over.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
