"""What takes minutes about resources of your own: all tests on both databases, and Schemathesis. `.ci/run` runs it."""

import sys
from pathlib import Path

import pytest

from tests.databases import MariaDB
from tests.dev.test_resource import Copy

NAMES = [{"NAME": "coupons"}, {"NAME": "gift_categories", "ZH": "礼品分类"}, {"NAME": "mice", "ONE": "mouse"}]
"""A plural of each kind, with and without a name in Chinese."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A copy with all of them, written one after the other."""
    copy = Copy(tmp_path_factory.mktemp("resources"))
    for names in NAMES:
        copy.run("make", "resource", *(f"{name}={value}" for name, value in names.items()))
    return copy


def test_all_tests_about_routes_and_tables_pass(written: Copy) -> None:
    written.run(
        "make", "test", "ARGS=--quiet tests/blueprints tests/contract/test_examples.py tests/test_architecture.py"
    )
    written.run("make", "lint")


def test_the_migrations_go_up_and_down_on_mariadb(written: Copy, tmp_path: Path) -> None:
    databases = MariaDB(tmp_path / "databases")
    databases.start()
    try:
        url = databases.create()
        for words in (["upgrade", "head"], ["check"], ["downgrade", f"-{len(NAMES)}"], ["upgrade", "head"], ["check"]):
            written.run(sys.executable, "-m", "alembic", *words, DATABASE_URL=url)
    finally:
        databases.close()


@pytest.mark.parametrize("database", ["sqlite", "mariadb"])
def test_schemathesis_finds_nothing(written: Copy, database: str) -> None:
    options = f"--database {database} --include-path-regex ^/api/v1/(coupons|gift-categories|mice)"
    written.run(sys.executable, "-m", "tests.contract.fuzz", "--minutes", "0.2", *options.split())
