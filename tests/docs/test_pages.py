"""The documents are complete: every page in both languages with the same structure, every link leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import INDEX, LANGUAGES, READMES, anchor, blocks, headings, names, page, pages, without_blocks
from tests.harness import ROOT

README_LINES = 150
MADE_BY_THE_READER = {"blueprints/payments.py"}
OF_OTHERS = {"HTTPS_PROXY", "notify_url"}
"""Names of requests' and of WeChat Pay's."""
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMENT = re.compile(r"(^|\s+)(#|//) .*")


OTHERS = [path for folder in ("clients", "deploy") for path in sorted((ROOT / folder).glob("*/README*.md"))]
"""The READMEs beside what they are about."""


def links(path: Path) -> list[str]:
    return _LINK.findall(without_blocks(path))


def files_linked(path: Path) -> list[str]:
    """Return the files that links lead to; those that exist in both languages by their English names."""
    return [link.partition("#")[0].replace(".zh-CN", "").replace(".en.md", ".md") for link in links(path)]


def anchors(path: Path) -> set[str]:
    return {anchor(text) for _, text in headings(path)}


def code(path: Path) -> list[tuple[str, list[str]]]:
    """Return the lines of each block without comments, which are in the page's language."""
    return [
        (kind, [_COMMENT.sub("", line) for line in text.splitlines() if _COMMENT.sub("", line).strip()])
        for kind, text in blocks(path)
    ]


def test_both_languages_have_the_same_pages() -> None:
    assert names("zh") == names("en")


@pytest.mark.parametrize("name", sorted({*names("zh"), *names("en")}))
def test_a_page_has_the_same_structure_in_both_languages(name: str) -> None:
    chinese, english = page("zh", name), page("en", name)
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    if name != "house.md":  # its one block is text to read
        assert code(chinese) == code(english)
    assert files_linked(chinese)[1:] == files_linked(english)[1:]
    assert chinese.read_text().count("\n| ") == english.read_text().count("\n| ")
    for one, other in ((chinese, "en"), (english, "zh")):
        assert links(one)[0] == f"../{other}/{name}"


@pytest.mark.parametrize("path", [*pages(), *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    lost = []
    for link in links(path):
        if link.startswith(("https://", "http://")):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (heading and heading not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_index_lists_every_page(language: str) -> None:
    listed = [link for link in links(page(language, INDEX)) if "/" not in link]
    assert sorted(listed) == [name for name in names(language) if name != INDEX]
    readme = {link.partition("#")[0] for link in links(READMES[language])}
    assert {f"docs/{language}/{name}" for name in names(language)} <= readme


def test_the_readmes_have_the_same_structure() -> None:
    chinese, english = READMES["zh"], READMES["en"]
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    assert [link.replace("/zh", "/en") for link in files_linked(chinese)][1:-2] == files_linked(english)[1:-2]


@pytest.mark.parametrize("readme", READMES.values(), ids=READMES)
def test_a_readme_is_short(readme: Path) -> None:
    assert len(readme.read_text().splitlines()) < README_LINES


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(path: Path) -> None:
    named = re.findall(
        r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|yaml|yml|conf|sh|m?js|html|env|service))`", without_blocks(path)
    )
    assert [name for name in named if not (ROOT / name).exists() and name not in MADE_BY_THE_READER] == []


def test_every_name_that_a_page_uses_is_in_the_code() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = [ROOT / name for name in tracked if not name.endswith((".md", ".json"))]
    known = {word for path in code for word in re.findall(r"\w+", path.read_text(errors="ignore"))}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lost = []
    for path in pages():
        of_the_page = {word for block in blocks(path) for word in re.findall(r"\w+", block.text)}
        spans = re.findall(r"`([^`]+)`", without_blocks(path))
        for span in [span for span in spans if "/" not in span]:  # files have a test of their own
            names = [name.removesuffix("_sum") for name in re.findall(r"[A-Za-z]\w*_\w*[A-Za-z0-9]\b", span)]
            lost += [
                name
                for name in names
                if not {name, name.removeprefix("kuaishang_")} & (known | of_the_page | OF_OTHERS)
            ]
            lost += [name for name in re.findall(r"\bmake ([a-z-]+)", span) if name not in targets]
    assert lost == []
