"""How long it takes until `make run` serves what is saved: `python -m bench.reload`.

In a copy of the project it saves a change of settings.py again and again, each time after a pause, while one client
asks on a connection that is kept and one on a new connection each time. Ends with a status that is not 0 if the median
of the seconds from a save to the first response of the new code is a second or more, or a request fails.
"""

import argparse
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests

from tests.harness import ROOT, Process, free_port, wait_until

GOAL_SECONDS = 1.0


class Client(threading.Thread):
    """Asks for the version without end, and notes when each was served first and last."""

    def __init__(self, url: str, session: requests.Session) -> None:
        super().__init__(daemon=True)
        self.url, self.session = url, session
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.failures: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                version = self.session.get(f"{self.url}/version", timeout=10).json()["data"]["version"]
            except (requests.RequestException, KeyError, ValueError) as error:
                self.failures.append(repr(error))
                continue
            self.last[version] = now = time.monotonic()
            self.first.setdefault(version, now)
            time.sleep(0.005)


def measure(clone: Path, clients: list[Client], saves: int, pause: float) -> tuple[list[float], list[float]]:
    """Save so often; return for each the seconds to the first response of the new code, and to the last of the old."""
    settings = clone / "settings.py"
    original = settings.read_text()
    firsts, lasts = [], []
    for number in range(1, saves + 1):
        before, version = f"save-{number - 1}" if number > 1 else "0.1.0", f"save-{number}"
        time.sleep(pause)
        began = time.monotonic()
        settings.write_text(re.sub(r"^VERSION = .*$", f'VERSION = "{version}"', original, flags=re.MULTILINE))
        wait_until(lambda: any(version in client.first for client in clients))  # noqa: B023
        wait_until(lambda: all(version in client.first for client in clients))  # noqa: B023
        time.sleep(0.5)  # until no old one comes any more
        firsts.append(min(client.first[version] for client in clients) - began)
        lasts.append(max(client.last[before] for client in clients) - began)
    return firsts, lasts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.reload", description="From a save to its first response.")
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".git", ".venv", "var", ".*_cache")
        clone = Path(shutil.copytree(ROOT, Path(folder, "clone"), ignore=ignored))
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        env = {"PATH": os.environ["PATH"], "PORT": str(port)}
        launcher = Process(["dev.run", "--var", f"{folder}/var"], env, Path(folder, "output"), root=clone)
        try:
            launcher.wait_for(f"{url}/livez")
            unkept = requests.Session()
            unkept.headers["Connection"] = "close"
            clients = [Client(url, requests.Session()), Client(url, unkept)]
            for client in clients:
                client.start()
            firsts, lasts = measure(clone, clients, options.saves, options.pause)
            for client in clients:
                client.ended.set()
                client.join()
        finally:
            launcher.stop()
    failures = [failure for client in clients for failure in client.failures]
    for name, seconds in (("first response of the new code", firsts), ("last response of the old code", lasts)):
        print(f"{name}: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")
    print(f"failed requests: {len(failures)}", *failures[:3], sep="\n  ")
    sys.exit(bool(failures) or statistics.median(firsts) >= GOAL_SECONDS)


if __name__ == "__main__":
    main()
