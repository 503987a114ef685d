"""The client's folder: types as openapi.json has them, and a sample that compiles, and whose pages work.

`make check-client` installs what these tests need from npm.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, WAIT_SECONDS, Service, Simulator

FOLDER = ROOT / "clients" / "miniprogram"
SAMPLE = FOLDER / "sample"
COPIED = "kuaishang.js", "kuaishang.d.ts"

needs_npm = pytest.mark.skipif(
    not (shutil.which("node") and (FOLDER / "node_modules").is_dir()), reason="`make check-client` was not run"
)


def run(*words: str | Path, environ: dict[str, str] | None = None) -> str:
    """Run a program in the client's folder; returns what it printed."""
    done = subprocess.run(
        words, cwd=FOLDER, env=environ, capture_output=True, text=True, timeout=5 * WAIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", COPIED)
def test_the_sample_has_the_client_itself(name: str) -> None:
    assert (SAMPLE / name).read_bytes() == (FOLDER / name).read_bytes(), "run `make client`"


@needs_npm
def test_the_types_are_those_of_the_contract(tmp_path: Path) -> None:
    run("node", "types.mjs", ROOT / "openapi.json", tmp_path / "kuaishang.d.ts")
    assert (tmp_path / "kuaishang.d.ts").read_text() == (FOLDER / "kuaishang.d.ts").read_text(), "run `make client`"


@needs_npm
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda order: order["get"].pop("operationId"), "GET /api/v1/orders/{order_id} has no operation id"),
        (lambda order: order["put"]["parameters"][0].update(name="remark"), "updateOrder: two fields are named remark"),
        (lambda order: order["get"]["responses"].update({"418": {"content": {"application/json": {}}}}), "getOrder"),
    ],
    ids=["no operation id", "two fields of one name", "no example of an error"],
)
def test_what_cannot_be_typed_is_an_error(damage: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    document = json.loads((ROOT / "openapi.json").read_text())
    damage(document["paths"]["/api/v1/orders/{order_id}"])
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    with pytest.raises(AssertionError, match=re.escape(message)):
        run("node", "types.mjs", tmp_path / "openapi.json", tmp_path / "kuaishang.d.ts")


@needs_npm
@pytest.mark.parametrize("project", ["tsconfig.json", "tsconfig.client.json"])
def test_types_sample_and_client_pass_the_strict_compiler(project: str) -> None:
    run("node_modules/.bin/tsc", "--project", project)


@needs_npm
def test_each_function_has_a_type() -> None:
    (client,) = re.findall(r"^export interface Client \{(.*?)^\}", (FOLDER / "kuaishang.d.ts").read_text(), re.M | re.S)
    typed = re.findall(r"^  (\w+)(?:<.*>)?\(", client, re.M)
    stub = "new Proxy({}, { get: () => () => '' })"
    script = f"global.wx = {stub}; console.log(Object.keys(require('./kuaishang').createClient({{}})).join(' '))"
    assert sorted(run("node", "--eval", script).split()) == sorted(typed)


@needs_npm
def test_the_sample_compiles_with_the_compilers_of_wechat() -> None:
    run("node", "--test", "tests/compile.test.js")


@needs_npm
def test_the_pages_of_the_sample_work(services: tuple[Service, Service], simulator: Simulator) -> None:
    addresses = {"SERVICE_URL": services[0].url, "SIMULATOR_URL": simulator.url, "PATH": os.environ["PATH"]}
    run("node", "--test", "tests/sample.test.js", environ=addresses)
