"""The READMEs and the changelog match the code."""

import re
from pathlib import Path

import pytest
from marshmallow import missing

import settings
from dev.run import login_to_paste
from errors import Code
from settings import Settings

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
README = pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["english", "chinese"])


def table(readme: Path, header: str) -> list[list[str]]:
    """Return the rows of the table with this header."""
    rows = readme.read_text().partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@README
def test_the_settings_table_matches_settings_py(readme: Path) -> None:
    required = {"README.md": "required", "README.zh-CN.md": "必需"}[readme.name]
    rows = table(readme, {"README.md": "name", "README.zh-CN.md": "名称"}[readme.name])
    assert [row[:2] for row in rows if row[0] not in ("`LOG_FORMAT`", "`SIMULATOR_PORT`")] == [
        [f"`{name}`", required if field.load_default is missing else str(field.load_default).strip("[]")]
        for name, field in Settings().fields.items()
    ]
    if readme is ENGLISH:
        assert [row[2] for row in rows[:-2]] == [field.metadata["help"] for field in Settings().fields.values()]
    assert all(row[2] for row in rows)


@README
def test_the_code_table_matches_errors_py(readme: Path) -> None:
    rows = table(readme, {"README.md": "code", "README.zh-CN.md": "业务码"}[readme.name])
    message = {"README.md": "english", "README.zh-CN.md": "chinese"}[readme.name]
    assert rows == [[str(code.number), str(code.status), getattr(code.message, message)] for code in Code]


@README
def test_each_dependency_has_one_line(readme: Path) -> None:
    chosen = {
        re.split(r"[\[;]", line)[0]
        for name in ("requirements.in", "requirements-dev.in")
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith(("#", "-"))
    }
    rows = table(readme, {"README.md": "package", "README.zh-CN.md": "包"}[readme.name])
    assert sorted(row[0] for row in rows) == sorted(chosen)


@README
def test_the_login_matches_the_output_of_make_run(readme: Path) -> None:
    printed = login_to_paste("http://127.0.0.1:8000", "http://127.0.0.1:8001")
    assert "\n".join(f"    {line}" for line in printed.splitlines()) in readme.read_text()


@README
def test_the_map_names_every_module_and_no_other(readme: Path) -> None:
    section = re.split(r"^## ", readme.read_text(), flags=re.MULTILINE)[5]
    named = set(re.findall(r"\b[\w.]+\.py\b", section))
    there = {path.name for part in ("*.py", "*/*.py") for path in ROOT.glob(part) if path.parent.name != "tests"}
    assert named - {"test_service.py"} == there


def test_the_changelog_has_a_section_for_the_version() -> None:
    assert f"\n## {settings.VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()
