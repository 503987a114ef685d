"""The blocks `text` of the documents that need the settings of a server, run with those of the tests."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.databases import Databases
from tests.docs.pages import blocks, page
from tests.harness import ROOT, WAIT_SECONDS, Process, Service, Simulator, free_port, wait_until

pytestmark = pytest.mark.only_on("sqlite")


def lines_of(name: str, beginning: str) -> list[str]:
    """Return the lines of the only block of a page that begins so."""
    (block,) = [block for block in blocks(page("zh", name)) if block.text.startswith(beginning)]
    return block.text.splitlines()


def run(line: str, environ: dict[str, str], folder: Path = ROOT) -> str:
    """Run a line of a page in the shell of an operator, and return what it prints."""
    env = {**environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_empty_database_is_migrated_and_served(
    environ: dict[str, str], databases: Databases, simulator: Simulator, tmp_path: Path
) -> None:
    install, migrate, serve = lines_of("production.md", "pip install")
    assert install == "pip install --require-hashes -r requirements.txt"  # as `make` has done
    port = str(free_port())
    settings = {**environ, "DATABASE_URL": databases.create(), "PORT": port}
    run(migrate, settings)
    settings["PATH"] = os.environ["PATH"]
    process = Process(serve.split(), settings, tmp_path / "output")
    try:
        process.wait_for(f"http://127.0.0.1:{port}/readyz")
    finally:
        process.kill()


def test_a_route_is_switched_off_and_on(services: tuple[Service, Service], simulator: Simulator) -> None:
    off, show, on = lines_of("production.md", "FLASK_APP=wsgi flask switch")
    token = services[1].log_in(simulator)

    def order() -> int:
        return services[1].call("POST", "/orders", token, json={"items": []}).status_code

    assert order() == 400
    run(off, services[0].environ)
    wait_until(lambda: order() == 503)  # each worker looks once a second
    assert "wrong prices" in run(show, services[0].environ)
    run(on, services[0].environ)
    wait_until(lambda: order() == 400)


def test_the_keys_are_rotated(environ: dict[str, str]) -> None:
    (rotate,) = lines_of("production.md", "FLASK_APP=deploy.keys flask keys")
    assert "All is under the first key." in run(rotate, environ)


def test_the_simulator_runs_by_itself(tmp_path: Path) -> None:
    (line,) = lines_of("simulator.md", ".venv/bin/python -m dev.wechat_simulator")
    port = str(free_port())
    _, _, *words = line.replace("8001", port).split()
    process = Process(words, dict(os.environ), tmp_path / "output")
    try:
        process.wait_for(f"http://127.0.0.1:{port}/simulator/calls")
    finally:
        process.kill()


def test_the_public_key_of_wechat_pay_becomes_a_setting(tmp_path: Path) -> None:
    (line,) = lines_of("payment.md", "grep")
    key = rsa.generate_private_key(65537, 2048).public_key()
    (tmp_path / "pub_key.pem").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert run(line, {}, tmp_path) == base64.b64encode(der).decode()
