"""The client's READMEs: each snippet runs against `make run`, the table has every code, both languages say the same."""

import re
import shutil
from pathlib import Path

import pytest

from errors import Code
from tests.dev.launched import Launched
from tests.docs.pages import blocks, headings, table
from tests.docs.test_snippets import launched, run
from tests.harness import ROOT

__all__ = ["launched"]  # the fixture

FOLDER = ROOT / "clients" / "miniprogram"
CHINESE, ENGLISH = FOLDER / "README.md", FOLDER / "README.en.md"
LANGUAGES = [CHINESE, ENGLISH]


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_each_snippet_runs(launched: Launched, tmp_path: Path) -> None:
    run("js", blocks(CHINESE), tmp_path, launched)


def test_both_languages_have_the_same_blocks_and_headings() -> None:
    assert blocks(CHINESE) == blocks(ENGLISH)
    assert [level for level, _ in headings(CHINESE)] == [level for level, _ in headings(ENGLISH)]


@pytest.mark.parametrize("path", LANGUAGES, ids=lambda path: path.name)
def test_the_table_has_every_code(path: Path) -> None:
    (local,) = re.findall(r"^export type LocalErrorCode = (.*)$", (FOLDER / "kuaishang.d.ts").read_text(), re.M)
    codes = {str(code.number) for code in Code if code is not Code.SUCCESS} | set(re.findall(r"'(\w+)'", local))
    listed = [code for row in table(path, "code") for code in row[0].split(", ")]
    assert sorted(listed) == sorted(codes)


def test_local_codes_are_those_of_the_client() -> None:
    (messages,) = re.findall(r"^const MESSAGES = \{(.*?)^\}", (FOLDER / "kuaishang.js").read_text(), re.M | re.S)
    (local,) = re.findall(r"^export type LocalErrorCode = (.*)$", (FOLDER / "kuaishang.d.ts").read_text(), re.M)
    assert set(re.findall(r"^\s*([A-Z_]+):", messages, re.M)) == set(re.findall(r"'(\w+)'", local))
