"""The mini-program's client, tested by node's test runner against the running service and the simulator."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.harness import APP_ID, APP_SECRET, ROOT, WAIT_SECONDS, Service, Simulator

FOLDER = ROOT / "clients" / "miniprogram"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


@pytest.fixture
def control(start_service: Callable[..., Service]) -> Iterator[tuple[Service, str]]:
    """The service, and the URL at which a test stops and starts it."""
    service = start_service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            {"/stop": service.stop, "/start": service.start}[self.path]()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    # In one thread: a service ends with the thread that started it.
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield service, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("tests/*.test.mjs")), ids=lambda path: path.name)
def test_client(path: Path, control: tuple[Service, str], simulator: Simulator) -> None:
    service, control_url = control
    urls = {"SERVICE_URL": service.url, "SIMULATOR_URL": simulator.url, "CONTROL_URL": control_url}
    urls |= {"WECHAT_APP_ID": APP_ID, "WECHAT_APP_SECRET": APP_SECRET}
    command = [NODE or "node", str(path)]  # which --test would run in a child, and leave behind if it hangs
    run = subprocess.run(command, env=os.environ | urls, capture_output=True, text=True, timeout=10 * WAIT_SECONDS)
    assert run.returncode == 0, run.stdout + run.stderr
