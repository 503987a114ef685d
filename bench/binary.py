"""The one file beside the same service from its source tree and a program in Go: `make bench-binary`.

For each, in turn in several rounds of one run: its size, the time from a start to the first response, and the memory of
all of its processes then (PSS: what several share counts once). One worker each. PEERS names a folder with
`gin_peer/main.go`, which is built with Debian's golang-go, golang-github-gin-gonic-gin-dev and
golang-github-gomodule-redigo-dev.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from bench import GO, environment
from dev.redis_server import executable
from tests.harness import ROOT, WAIT_SECONDS, free_port

FILE = ROOT / "dist" / "kuaishang"


def first_response(command: Sequence[str | Path], environ: dict[str, str], path: str) -> tuple[float, float]:
    """Start a server, and stop it when it responds.

    :returns: the seconds until then, and the memory of its processes in MB.
    """
    port = free_port()
    environ = {**environ, "PORT": str(port), "BIND": f"127.0.0.1:{port}", "HOST": "127.0.0.1"}
    began = time.monotonic()
    with subprocess.Popen(command, env=environ, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while True:
            with suppress(requests.ConnectionError):
                requests.get(f"http://127.0.0.1:{port}{path}", timeout=WAIT_SECONDS).raise_for_status()
                break
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended instead of starting")
            time.sleep(0.005)
        taken = time.monotonic() - began
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        memory = sum(one.memory_full_info().pss for one in family) / 1e6
        process.terminate()
    return taken, memory


def gin(folder: Path) -> Path | None:
    """Build the Go program, if there are one and a compiler."""
    source = Path(os.environ.get("PEERS") or "/nowhere").resolve() / "gin_peer" / "main.go"
    if not (source.exists() and shutil.which("go")):
        print("Without the Go program: PEERS names no folder with gin_peer/main.go, or go is not installed.")
        return None
    subprocess.run(
        ["go", "build", "-o", folder / "gin_peer", source],
        env={**os.environ, **GO, "GOCACHE": str(folder / "go")},
        check=True,
    )
    return folder / "gin_peer"


def main() -> None:
    options = argparse.ArgumentParser(description="Compare the one file with a Go program.")
    options.add_argument("--rounds", type=int, default=7)
    rounds = options.parse_args().rounds
    with tempfile.TemporaryDirectory() as name, environment() as environ:
        folder = Path(name)
        redis_port = free_port()
        redis = [executable(), "--port", str(redis_port), "--save", "", "--dir", name]
        environ = {**environ, "WEB_CONCURRENCY": "1", "DRAIN_SECONDS": "0", "XDG_CACHE_HOME": name}
        tree = [sys.executable, "-m", "gunicorn", "wsgi:app"]
        starts: dict[str, tuple[list[str | Path], str, Path | None]] = {
            "one file, its first start": ([FILE, "serve"], "/livez", FILE),
            "one file": ([FILE, "serve"], "/livez", FILE),
            "source tree": ([*tree], "/livez", None),
        }
        if program := gin(folder):
            starts["Gin"] = ([program], "/healthz", program)
            environ["REDIS_ADDR"] = f"127.0.0.1:{redis_port}"
        figures: dict[str, list[tuple[float, float]]] = {row: [] for row in starts}
        with subprocess.Popen(redis, stdout=subprocess.DEVNULL) as server:
            for _ in range(rounds):
                for row, (command, path, _) in starts.items():
                    if "first" in row:
                        shutil.rmtree(folder / "kuaishang", ignore_errors=True)
                    figures[row].append(first_response(command, environ, path))
            server.terminate()
        sizes = {row: f"{file.stat().st_size / 1e6:.1f}" for row, (_, _, file) in starts.items() if file}
    print(f"{'':28}{'file MB':>9}{'first response s':>18}{'memory MB':>11}")
    for row in starts:
        seconds, memory = (statistics.median(values) for values in zip(*figures[row], strict=True))
        print(f"{row:28}{sizes.get(row, ''):>9}{seconds:18.3f}{memory:11.0f}")


if __name__ == "__main__":
    main()
