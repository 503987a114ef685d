"""`patch.py` as an operator runs it, with a supervisor, under load."""

import json
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.deploy.patch.server import Server, copy_tree
from tests.deploy.patch.test_supervisor import Patched
from tests.faults.load import codes, is_right, load
from tests.harness import WAIT_SECONDS, wait_until

DONE, REFUSED, BUSY = 0, 1, 3


@pytest.fixture(scope="module")
def stage() -> Iterator[Patched]:
    with ExitStack() as stack:
        yield Patched(stack)


@pytest.fixture
def server(stage: Patched) -> Server:
    return stage.server


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree that a developer edits."""
    tree = copy_tree(tmp_path / "tree")
    append(tree / "blueprints/orders.py", f"# {tmp_path}")
    return tree


def append(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}{line}\n")


def test_a_tree_goes_live_under_load_and_back_again(stage: Patched, server: Server, tree: Path) -> None:
    before = server.serves()
    append(tree / "blueprints/orders.py", "# one more line")

    with load(stage) as running:
        done = server.tool("patch", str(tree), "--watch", "1", "--by", "Li Lei")
        assert done.returncode == DONE, done.stdout + done.stderr
        after = server.serves()
        status = server.tool("status").stdout
        back = server.tool("rollback")

    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    assert running.count_orders() == (0, 0)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("runs: ")
    for step in ("copied", "checked", "migrated", "starts beside", "serves, with 2 workers"):
        assert re.search(rf"^ +\d+\.\d\d s  {step}", done.stdout, re.MULTILINE), done.stdout
    assert lines[-1].startswith("serves: ")
    assert after in lines[-1]
    assert after != before
    assert "by Li Lei: done" in status
    assert "  blueprints/orders.py +2 -0" in status.splitlines()
    assert back.returncode == DONE, back.stdout + back.stderr
    assert server.serves() == before


def test_a_tree_that_is_wrong_is_refused_and_says_where(server: Server, tree: Path) -> None:
    before, releases = server.serves(), {path.name for path in (server.home / "releases").iterdir()}
    append(tree / "blueprints/orders.py", "def (")
    refused = server.tool("patch", str(tree))
    assert refused.returncode == REFUSED
    assert re.search(r"blueprints/orders\.py\D+\d+", refused.stdout + refused.stderr)
    assert refused.stdout.splitlines()[-1].startswith("serves: ")
    assert server.serves() == before
    assert {path.name for path in (server.home / "releases").iterdir()} == releases


def test_requirements_that_cannot_be_installed_are_refused(server: Server, tree: Path) -> None:
    before, environments = server.serves(), {path.name for path in (server.home / "environments").iterdir()}
    append(tree / "requirements.txt", f"no-such-package==1 --hash=sha256:{'0' * 64}")
    refused = server.tool("patch", str(tree), PIP_NO_INDEX="1")
    assert refused.returncode == REFUSED
    assert "the requirements cannot be installed" in refused.stdout
    assert server.serves() == before
    assert {path.name for path in (server.home / "environments").iterdir()} == environments


def test_an_archive_and_a_git_ref_go_live(server: Server, tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "release.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, "kuaishang-0.1.0")
    assert server.tool("patch", str(archive), "--watch", "0").returncode == DONE
    archived = server.serves()

    append(tree / "blueprints/orders.py", "# in git")
    git = ["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "x"]):
        subprocess.run([*git, *words], check=True)
    append(tree / "blueprints/orders.py", "def (")  # which is not in the commit
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:12]
    done = server.tool("patch", "HEAD", "--watch", "0", script=tree / "deploy/patch/patch.py")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert commit in done.stdout.splitlines()[-1]
    assert server.serves() != archived


def test_what_runs_already_is_not_deployed_again(server: Server, tree: Path) -> None:
    assert server.tool("patch", str(tree), "--watch", "0").returncode == DONE
    again = server.tool("patch", str(tree), "--watch", "0")
    assert again.returncode == REFUSED
    assert "nothing is different" in again.stdout


def test_one_patch_at_a_time(server: Server, tree: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(server.tool, "patch", str(tree), "--watch", "3")
        wait_until(lambda: json.loads(server.state.read_text())["provisional"])
        assert server.tool("patch", str(tree)).returncode == BUSY
    assert first.result().returncode == DONE


def test_five_releases_are_kept(server: Server, tree: Path) -> None:
    for number in range(6):
        append(tree / "blueprints/orders.py", f"# {number}")
        assert server.tool("patch", str(tree), "--watch", "0").returncode == DONE
    state = json.loads(server.state.read_text())
    assert len(state["previous"]) == 4
    assert {path.name for path in (server.home / "releases").iterdir()} == {state["current"], *state["previous"]}


def test_the_first_release_waits_for_the_service_to_start(stage: Patched, tmp_path: Path, tree: Path) -> None:
    settings = {name: value for name, value in stage.server.environ.items() if name != "PORT"}
    server = Server(tmp_path / "home", settings, released=False, **stage.secrets)
    done = server.tool("patch", str(tree))
    assert done.returncode == DONE, done.stdout + done.stderr
    assert "systemctl start" in done.stdout
    try:
        server.start()
        assert server.serves() in done.stdout
    finally:
        server.discard()


def test_a_folder_that_is_not_ours_is_refused_in_a_line(tmp_path: Path, server: Server) -> None:
    nowhere = Server.__new__(Server)
    nowhere.home, nowhere.environ = tmp_path / "nowhere", server.environ
    for words in (["patch"], ["rollback"]):
        refused = nowhere.tool(*words)
        assert refused.returncode == REFUSED
        assert "cannot be written" in refused.stdout
    assert "nothing" in nowhere.tool("status").stdout


def test_a_rollback_answers_while_a_patch_is_watched(server: Server, tree: Path) -> None:
    before = server.serves()
    with ThreadPoolExecutor(1) as executor:
        patched = executor.submit(server.tool, "patch", str(tree), "--watch", str(WAIT_SECONDS))
        wait_until(lambda: server.serves() != before)
        began = time.monotonic()
        assert server.tool("rollback").returncode == DONE
        assert time.monotonic() - began < WAIT_SECONDS / 2
    assert patched.result().returncode == 4
    assert server.serves() == before
