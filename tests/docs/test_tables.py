"""The tables and lists of the documents match the code."""

import re

import pytest
from marshmallow import missing

import settings
from dev import openapi, wechat_simulator
from dev.run import login_to_paste
from dev.wechat_simulator import create_simulator
from errors import Code
from settings import Settings
from tests.docs.pages import LANGUAGES, READMES, blocks, page, table
from tests.harness import ROOT

LANGUAGE = pytest.mark.parametrize("language", LANGUAGES)


@LANGUAGE
def test_the_settings_table_matches_settings_py(language: str) -> None:
    required = {"en": "required", "zh": "必需"}[language]
    rows = table(page(language, "settings.md"), {"en": "name", "zh": "名称"}[language])
    assert [row[:2] for row in rows if row[0] not in ("`LOG_FORMAT`", "`SIMULATOR_PORT`")] == [
        [f"`{name}`", required if field.load_default is missing else str(field.load_default).strip("[]")]
        for name, field in Settings().fields.items()
    ]
    if language == "en":
        assert [row[2] for row in rows[:-2]] == [field.metadata["help"] for field in Settings().fields.values()]
    assert all(row[2] for row in rows)


@LANGUAGE
def test_the_code_table_matches_errors_py(language: str) -> None:
    rows = table(page(language, "codes.md"), {"en": "code", "zh": "业务码"}[language])
    n, advice = ("zh", "en").index(language), openapi.advice()
    assert [row[:4] for row in rows] == [
        [str(code.number), str(code.status), code.message[n], advice[code][n]] for code in Code
    ]
    assert all(len(row) == 5 and row[4] for row in rows)


@LANGUAGE
def test_each_dependency_has_one_line(language: str) -> None:
    chosen = {
        re.split(r"[\[;]", line)[0]
        for name in ("requirements.in", "requirements-dev.in")
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith(("#", "-"))
    }
    rows = table(page(language, "dependencies.md"), {"en": "package", "zh": "包"}[language])
    assert sorted(row[0] for row in rows) == sorted(chosen)
    assert all(row[1] for row in rows)


@LANGUAGE
def test_the_login_matches_the_output_of_make_run(language: str) -> None:
    printed = login_to_paste("http://127.0.0.1:8000", "http://127.0.0.1:8001")
    assert "\n".join(f"    {line}" for line in printed.splitlines()) in READMES[language].read_text()


@LANGUAGE
def test_the_map_names_every_module_and_no_other(language: str) -> None:
    (house,) = blocks(page(language, "house.md"))
    named = set(re.findall(r"\b[\w.]+\.py\b", house.text))
    there = {path.name for part in ("*.py", "*/*.py") for path in ROOT.glob(part) if path.parent.name != "tests"}
    assert named - {"test_service.py"} == there


@LANGUAGE
def test_the_simulators_table_names_every_control(language: str) -> None:
    rules = [rule for rule in create_simulator("wx0", "secret").url_map.iter_rules() if "/simulator" in rule.rule]
    served = {(method, rule.rule.partition("<")[0]) for rule in rules for method in rule.methods or ()}
    rows = table(page(language, "simulator.md"), {"en": "control", "zh": "接口"}[language])
    written = {tuple(row[0].strip("`").partition("{")[0].split(" ")): row[1] for row in rows}
    assert written.keys() == {one for one in served if one[0] not in ("HEAD", "OPTIONS")}
    described = re.findall(
        r"^    (POST|GET|DELETE) (/[a-z_/]+)(.*(?:\n     .*)*)", wechat_simulator.__doc__, re.MULTILINE
    )
    for method, path, text in described:
        fields = re.findall(r"`(\w+)`", written[method, path])
        body = text.partition("->")[0]
        assert set(re.findall(r'"(\w+)"\?', body)) <= set(fields) <= set(re.findall(r'"(\w+)"', body)), path


def test_the_changelog_has_a_section_for_the_version() -> None:
    assert f"\n## {settings.VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()
