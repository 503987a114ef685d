"""A hundred patches in a row under load, twenty of them broken: no request fails, and nothing grows.

Some come through patch.py; most are given to the supervisor as they are, as the checks would refuse the broken ones.

`make hundred-patches`; `.ci/run` makes fewer. The seed is printed, and SEED repeats a run.
"""

import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.deploy.patch.broken import BROKEN
from tests.deploy.patch.server import Patched, Server, copy_tree, replace_workers
from tests.faults.load import ITEM, codes, is_right, load
from tests.harness import wait_until

PATCHES, BAD = int(os.environ.get("PATCHES") or 100), 0.2
BIG_ORDER = [{**ITEM, "name": "茶" * 128}] * 32  # 16 KB
GROWTH = 1.15


def test_a_hundred_patches_cost_no_request(stage: Patched, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    orders = (tree / "blueprints/orders.py").read_text()
    seed = os.environ.get("SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"SEED={seed}")
    chosen, server = random.Random(seed), stage.server
    bad = {*chosen.sample(range(PATCHES), int(BAD * PATCHES))}
    slow, early = SlowClient(server.port), Usage(0, 0)
    with load(stage, BIG_ORDER) as running:
        for number in range(PATCHES):
            current = server.state.read_text()
            if number in bad:
                what = chosen.choice(sorted(BROKEN))
                ended = server.patch(server.release(BROKEN[what][0]))
                assert ended["end"] == "refused", (what, ended)
                assert server.state.read_text() == current
            elif number % 5 == 4:  # as an operator does, with all checks
                (tree / "blueprints/orders.py").write_text(f"{orders}# {number}\n")
                done = server.tool("patch", str(tree), "--watch", "1")
                assert done.returncode == 0, done.stdout + done.stderr
                release = server.serves()
            else:
                release = server.release()
                assert server.patch(release)["end"] == "done"
            if number == PATCHES // 5:
                early = usage(server)
        late = usage(server)
        slow.over.set()
    print(f"{len(running.outcomes)} requests; after {PATCHES // 5 + 1} patches {early}, in the end {late}")
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    assert (running.count_orders(), running.missing_sessions) == ((0, 0), 0)
    assert slow.failures() == []
    assert server.serves() == release
    replace_workers(server)
    assert server.serves() == release
    assert late.descriptors <= early.descriptors + 2
    assert late.megabytes <= early.megabytes * GROWTH


class Usage(NamedTuple):
    """What the supervisor has open, and its memory and that of all its processes."""

    descriptors: int
    megabytes: float


def usage(server: Server) -> Usage:
    """Measure when the retired workers have ended."""
    wait_until(lambda: len(server.workers()) == 2 and len(server.masters()) == 2)  # one of them paused
    supervisor = psutil.Process(server.process.popen.pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    return Usage(supervisor.num_fds(), sum(process.memory_info().rss for process in processes) / 2**20)


BODY = b'{"code": "unknown"%s}' % (b" " * 2000)
PIECES = (
    b"POST /api/v1/auth/wechat HTTP/1.1\r\nHost: local",
    b"host\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(BODY),
    BODY[:1000],
    BODY[1000:],
)


class SlowClient(threading.Thread):
    """Sends a login in pieces, over two seconds, again and again: each is told that there is no such code."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.over = threading.Event()
        self.responses: list[bytes] = []
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
                for piece in PIECES:
                    connection.sendall(piece)
                    time.sleep(0.5)
                self.responses.append(connection.makefile("rb").read())

    def failures(self) -> list[bytes]:
        self.join()
        return [response for response in self.responses if b"wx.login" not in response]
