"""The blocks of the documents run as they stand, page by page and in order, against what `make run` starts.

A block `sh` is run by bash, a block `js` by node with a `wx` that does real HTTP; those of a page share variables.
The Chinese pages are run: test_pages.py holds the English ones to the same lines.
The block `json` after one is what its last line prints: the same keys and values, except those that differ each time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.dev.launched import Launched
from tests.docs.pages import LANGUAGES, Block, blocks, names, page
from tests.harness import ROOT, WAIT_SECONDS

SERVICE, SIMULATOR = "http://127.0.0.1:8000", "http://127.0.0.1:8001"
"""The addresses in the documents."""
DONE = "--- the block is done ---"
# A phone: its `wx`, what the phone number button gives, and a console that prints values as JSON.
PHONE = f"""\
import {{ createRequire }} from 'node:module'
import {{ createWx, simulator }} from '{ROOT}/clients/miniprogram/tests/wx.mjs'
const require = createRequire('{ROOT}/clients/miniprogram/sample/')
globalThis.wx = createWx()
const event = {{ detail: await simulator('phone_codes', {{ phone: '13812345678' }}) }}
console.log = value => process.stdout.write(JSON.stringify(value) + '\\n')
"""
PROGRAMS = {
    "sh": ("", f"printf '\\n%s\\n' '{DONE}'", ["bash", "-euo", "pipefail"]),
    "js": (PHONE, f"process.stdout.write('\\n{DONE}\\n')", ["node"]),
}
"""For each kind of block: what comes first, what comes after each block, and what runs them."""
PAGES = [
    (name, kind)
    for name in names("zh")
    for kind in ("sh", "js")
    if kind in {block.kind for block in blocks(page("zh", name))}
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("launched")
    running = Launched(folder / "var", folder / "output").ready()
    yield running
    running.end()


def run(kind: str, page_blocks: list[Block], folder: Path, launched: Launched) -> None:
    """Run the blocks of this kind, and compare what they print."""
    addresses = {SERVICE: launched.url, SIMULATOR: launched.simulator_url()}
    numbers = [number for number, block in enumerate(page_blocks) if block.kind == kind]
    begin, end, words = PROGRAMS[kind]
    script = begin
    for number in numbers:
        text = re.sub("|".join(addresses), lambda found: addresses[found[0]], page_blocks[number].text)
        script += f"{text}\n{end}\n"
    (folder / "page.mjs").write_text(script)
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    env |= {"SERVICE_URL": launched.url, "SIMULATOR_URL": launched.simulator_url()}
    words = [*words, "page.mjs"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.split(f"{DONE}\n")
    assert len(printed) == len(numbers) + 1, done.stdout
    for number, output in zip(numbers, printed, strict=False):
        if page_blocks[number + 1 : number + 2] and page_blocks[number + 1].kind == "json":
            last_line = output.strip().rpartition("\n")[2]
            assert difference(json.loads(page_blocks[number + 1].text), json.loads(last_line)) is None, last_line


def difference(documented: Any, printed: Any, where: str = "") -> str | None:
    """Return where two values differ; None if they do not.

    Ids, times and what the page shortens with … differ each time: they only have the same type.
    """
    if isinstance(documented, dict) and isinstance(printed, dict):
        if documented.keys() != printed.keys():
            return f"{where} has {', '.join(printed)}"
        found = (difference(documented[name], printed[name], f"{where}.{name}") for name in documented)
        return next(filter(None, found), None)
    if isinstance(documented, list) and isinstance(printed, list):
        if len(documented) != len(printed):
            return f"{where} has {len(printed)} items"
        found = (
            difference(*pair, f"{where}.{number}") for number, pair in enumerate(zip(documented, printed, strict=True))
        )
        return next(filter(None, found), None)
    differs_each_time = re.search(r"(^|[._])(id|at)$", where) or "…" in str(documented)
    same = type(documented) is type(printed) if differs_each_time else documented == printed
    return None if same else f"{where} is {printed!r}, not {documented!r}"


@pytest.mark.parametrize(("name", "kind"), PAGES)
def test_the_blocks_of_a_page_run(name: str, kind: str, launched: Launched, tmp_path: Path) -> None:
    if not shutil.which(program := {"sh": "curl", "js": "node"}[kind]):
        pytest.skip(f"{program} is not installed")
    requests.delete(f"{launched.simulator_url()}/simulator", timeout=WAIT_SECONDS).raise_for_status()
    run(kind, blocks(page("zh", name)), tmp_path, launched)


@pytest.mark.parametrize(
    ("documented", "printed", "where"),
    [
        ({"data": {"id": 1, "total": 5}}, {"data": {"id": 2, "total": 5}}, None),
        ({"data": {"id": 1, "total": 5}}, {"data": {"id": 1, "total": 6}}, ".data.total is 6, not 5"),
        ({"data": {"id": 1}}, {"data": {"id": "1"}}, ".data.id is '1', not 1"),
        ({"token": "…"}, {"token": "kPXX0LOg"}, None),
        ({"data": None}, {"data": None, "more": 1}, " has data, more"),
        ([{"paid": 1}], [{"paid": 1}, {"paid": 1}], " has 2 items"),
        ([{"paid": 1}], [{"paid": 2}], ".0.paid is 2, not 1"),
    ],
)
def test_a_difference_is_named(documented: Any, printed: Any, where: str | None) -> None:
    assert difference(documented, printed) == where


def test_every_kind_of_block_is_known() -> None:
    kinds = {block.kind for language in LANGUAGES for name in names(language) for block in blocks(page(language, name))}
    assert kinds <= {"sh", "js", "json", "text", "python"}
