"""The documents for people: both READMEs and the pages of docs/, and what is in a page."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.harness import ROOT

LANGUAGES = "zh", "en"
READMES = {"zh": ROOT / "README.zh-CN.md", "en": ROOT / "README.md"}
INDEX = "README.md"
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: the word after the fence, and the text without the fence's indentation."""

    kind: str
    text: str


def page(language: str, name: str) -> Path:
    return ROOT / "docs" / language / name


def names(language: str) -> list[str]:
    """Return the file names of a language's pages, the index among them."""
    return sorted(path.name for path in (ROOT / "docs" / language).iterdir())


def pages() -> list[Path]:
    return [*READMES.values(), *(page(language, name) for language in LANGUAGES for name in names(language))]


def blocks(path: Path) -> list[Block]:
    return [
        Block(kind, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, kind, text in _BLOCK.findall(path.read_text())
    ]


def without_blocks(path: Path) -> str:
    """Return what is between the blocks."""
    return _BLOCK.sub("", path.read_text())


def headings(path: Path) -> list[tuple[int, str]]:
    """Return level and text of each heading."""
    found = re.findall(r"^(#+) (.+)$", without_blocks(path), re.MULTILINE)
    return [(len(marks), text) for marks, text in found]


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table(path: Path, header: str) -> list[list[str]]:
    """Return the cells of each row of the table whose header begins with this cell."""
    rows = path.read_text().partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
