"""docs/zh/resource.md, followed to the letter on a copy of the repository: what it writes works, and all else stays."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.patch.migrations import check_migrations
from dev import compatibility
from dev.migration import tidy
from dev.resource import __main__ as resource
from dev.resource.__main__ import NOT_COPIED, Refused, bring_back, make_names, refuse_taken
from tests.dev.launched import Launched
from tests.docs.pages import Block, blocks, page
from tests.docs.test_snippets import SERVICE, SIMULATOR, difference
from tests.harness import ROOT

CLIENT = "clients/miniprogram"
needs_npm = pytest.mark.skipif(not resource.has_node(), reason="`make check-client` was not run")
ABOUT_ALL_RESOURCES = [
    *("tests/test_architecture.py", "tests/storage/test_ownership.py"),
    *("tests/blueprints/test_api.py", "tests/docs/test_tables.py", "tests/docs/test_pages.py"),
    "tests/clients/test_miniprogram.py::test_client[operations.test.mjs]",
]
"""What holds every resource to the rules of the house. The others are in resource_in_full.py, as they take minutes."""


class Copy:
    """This repository, committed in a folder of its own, with our virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copy"
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(ROOT, self.root, ignore=lambda where, names: {*ignored(where, names)} - {".mypy_cache"})
        (self.root / ".venv").symlink_to(sys.prefix)
        (self.root / CLIENT / "node_modules").symlink_to(ROOT / CLIENT / "node_modules")
        for name in (
            "requirements.txt",
            "requirements-dev.txt",
            f"{CLIENT}/package.json",
            f"{CLIENT}/package-lock.json",
        ):
            os.utime(self.root / name, (0, 0))  # so that make installs nothing
        self.run("git", "init", "--quiet")
        (self.root / ".git/info/exclude").write_text("node_modules\n")
        self.run("git", "add", "--all")
        self.run(
            "git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "commit", "--quiet", "-m", "all"
        )

    def run(self, *command: str, **environ: str) -> str:
        """Return what a command prints; it must succeed."""
        done = self.try_to_run(*command, **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_to_run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.root.parent), "PYTHONDONTWRITEBYTECODE": "1", **environ}
        return subprocess.run(command, cwd=self.root, env=environ, capture_output=True, text=True, check=False)

    def pytest(self, *words: str) -> None:
        self.run(sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *words)

    def changes(self) -> list[str]:
        """Return what is not as it was committed, in the words of the page."""
        lines = self.run("git", "status", "--porcelain", "--untracked-files=all").splitlines()
        kinds = {" M": "changed", "??": "new    "}
        return sorted((f"{kinds[line[:2]]} {line[3:]}" for line in lines), key=lambda line: line[8:])


def follow(block: Block, following: Block | None, copy: Copy, launched: list[Launched]) -> None:
    """Do what a block says. Commands that start with `make run` go on running."""
    if block.kind == "python":
        insert(block.text, copy.root)
    elif block.text == "make run\n":
        launched.append(Launched(copy.root / "var", copy.root.parent / "output", root=copy.root).ready())
    elif block.kind == "text" and not block.text.startswith("changed "):
        script = block.text
        for running in launched:
            script = script.replace(SERVICE, running.url).replace(SIMULATOR, running.simulator_url())
        printed = copy.run("bash", "-euo", "pipefail", "-c", script)
        if following and following.text.startswith("changed "):
            assert printed == following.text
            assert copy.changes() == following.text.splitlines()
        elif following and following.kind == "json":
            assert difference(json.loads(following.text), json.loads(printed)) is None, printed


def insert(text: str, root: Path) -> None:
    """Put lines where their comment says: below an assignment, or at the end of a class."""
    comment, _, lines = text.partition("\n")
    found = re.match(r"# ([\w/.]+)\W+(?:below |in )?(\w+)", comment)
    assert found, comment
    path = root / found[1]
    (end,) = [
        node.end_lineno or 0
        for node in ast.parse(path.read_text()).body
        if getattr(node, "name", None) == found[2] or ast.unparse(node).startswith(f"{found[2]} = ")
    ]
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*before[:end], lines, *before[end:]]))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("resource"))


@pytest.fixture(scope="module")
def followed(copy: Copy) -> Iterator[Copy]:
    """The copy, after the whole page."""
    page_blocks = blocks(page("zh", "resource.md"))
    assert {block.kind for block in page_blocks} == {"text", "python", "json"}
    with ExitStack() as stack:
        launched: list[Launched] = []
        stack.callback(lambda: [running.end() for running in launched])
        for block, following in zip(page_blocks, [*page_blocks[1:], None], strict=True):
            follow(block, following, copy, launched)
        assert len(launched) == 1
        yield copy


@needs_npm
def test_the_page_changes_what_it_says_and_nothing_else(followed: Copy) -> None:
    (said,) = [block.text for block in blocks(page("zh", "resource.md")) if block.text.startswith("changed ")]
    assert followed.changes() == said.splitlines()


@needs_npm
def test_a_new_resource_breaks_no_client(followed: Copy) -> None:
    before, after = (json.loads((root / "openapi.json").read_text()) for root in (ROOT, followed.root))
    assert compatibility.breaking_changes(before, after, compatibility.date.today()) == []
    assert after["paths"].keys() - before["paths"].keys() == {"/api/v1/coupons", "/api/v1/coupons/{coupon_id}"}


@needs_npm
def test_the_migration_goes_up_and_down_and_is_safe(followed: Copy, tmp_path: Path) -> None:
    says, differ = check_migrations(followed.root, ROOT)
    assert differ
    assert re.fullmatch(r"\d{4} to (\d{4}), \+\1", says)
    for words in (["upgrade", "head"], ["check"], ["downgrade", "-1"], ["upgrade", "head"], ["check"]):
        followed.run(sys.executable, "-m", "alembic", *words, DATABASE_URL=f"sqlite:///{tmp_path}/test.db")


@needs_npm
def test_what_holds_for_every_resource_holds_for_the_new_one(followed: Copy) -> None:
    followed.pytest(*ABOUT_ALL_RESOURCES)


@needs_npm
def test_its_documented_examples_are_its_tests(followed: Copy) -> None:
    followed.pytest("tests/contract/test_examples.py", "-k", "Coupon or export")


@pytest.mark.parametrize(
    ("many", "singular", "one"),
    [
        ("coupons", "", "coupon"),
        ("gift_cards", "", "gift_card"),
        ("categories", "", "category"),
        ("addresses", "", "address"),
        ("branches", "", "branch"),
        ("boxes", "", "box"),
        ("movies", "movie", "movie"),
        ("mice", "mouse", "mouse"),
    ],
)
def test_the_singular_follows_from_the_plural_or_is_given(many: str, singular: str, one: str) -> None:
    names = make_names(many, singular, "")
    refuse_taken(names, ROOT)
    assert names["one"] == one


@pytest.mark.parametrize(
    ("many", "one", "chinese", "why"),
    [
        ("", "", "", "make resource NAME=coupons"),
        ("Coupons", "", "", "is no name"),
        ("coupons2", "", "", "is no name"),
        ("gift-cards", "", "", "is no name"),
        ("_coupons", "", "", "is no name"),
        ("coupons\n", "", "", "is no name"),
        ("very_long_names_of_coupons", "", "", "is no name"),
        ("people", "Person", "", "is no name"),
        ("coupon", "", "", "not in the plural"),
        ("business", "", "", "not in the plural"),
        ("s", "", "", "must differ"),
        ("news", "news", "", "must differ"),
        ("coupons", "", 'a"b', "no name in Chinese"),
        ("classes", "", "", "class means something in Python"),
        ("types", "", "", "type means something in Python"),
        ("nones", "", "", "None means something in Python"),
        ("orders", "", "", "blueprints/orders.py already"),
        ("policies", "", "", "blueprints/policies.py already"),
        ("idempotency_keys", "", "", "in storage/models.py already"),
        ("order_items", "", "", "in storage/models.py already"),
        ("indexes", "", "", "in storage/models.py already"),
        ("fields", "", "", "fields means something in"),
        ("schemas", "", "", "in dev/resource/blueprint.txt already"),
        ("paths", "", "", "in dev/resource/test.txt already"),
        ("items", "", "", "ITEM means something in tests/blueprints/callers.py already"),
        ("products", "item", "", "ITEM means something in tests/blueprints/callers.py already"),
        ("readinesses", "", "", "openapi.json has Readiness already"),
        ("exports", "", "", "ExportSchema means something in blueprints/personal_data.py already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(many: str, one: str, chinese: str, why: str) -> None:
    with pytest.raises(Refused, match=re.escape(why)):
        refuse_taken(make_names(many, one, chinese), ROOT)


def test_if_a_step_fails_nothing_is_written(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    with (copy.root / "dev/openapi.py").open("a") as module:  # one of the last steps
        module.write("\nraise SystemExit('no document')\n")
    for name, why in (
        ("coupons", "dev.openapi failed:\nno document\n\nNothing has been changed."),
        ("orders", "There is blueprints/orders.py already.\nNothing has been changed."),
        ("$(shell touch made)", "is no name"),
        ("'; touch made; '", "is no name"),
    ):
        done = copy.try_to_run("make", "resource", f"NAME={name}")
        assert done.returncode != 0
        assert why in done.stderr
        assert copy.changes() == ["changed dev/openapi.py"], name


def test_a_file_without_a_place_for_its_line_is_named() -> None:
    edit = resource.Edit("storage/ownership.py", "^NO_SUCH_LINE", "    Owned($Model)\n")
    with pytest.raises(Refused, match=re.escape("storage/ownership.py has no place for this: Owned(Coupon)")):
        resource.insert(edit, make_names("coupons", "", ""), ROOT)


def test_files_are_brought_back_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "ROOT", tmp_path)
    (tmp_path / "old").write_bytes(b"1")
    before, changed = {"old": b"1"}, {"old": b"2", "new": b"3"}
    with pytest.raises(FileNotFoundError):
        bring_back(before, {**changed, "no/such/folder": b"4"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for meanwhile in ("old", "new"):
        kept = (tmp_path / "old").read_bytes()
        (tmp_path / meanwhile).write_bytes(b"of somebody else")
        with pytest.raises(Refused, match=f"{meanwhile} has been changed meanwhile"):
            bring_back(before, changed)
        assert (tmp_path / meanwhile).read_bytes() == b"of somebody else"
        (tmp_path / "old").write_bytes(kept)
    (tmp_path / "new").unlink()
    bring_back(before, changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == changed


def test_a_migration_is_tidied() -> None:
    kept = '    op.drop_index("ix_orders_total", table_name="orders")\n    op.drop_table("coupons")\n'
    gone = '    # ### commands auto generated by Alembic ###\n    op.drop_index("a", table_name="coupons")\n'
    assert tidy(gone + kept) == kept
