"""`patch.py` as an operator runs it, with a supervisor, under load."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from deploy.patch import patch
from storage.database import engine_for
from tests.deploy.patch.server import Patched, Server, copy_tree
from tests.deploy.patch.test_check import add_migration
from tests.faults.load import codes, is_right, load
from tests.harness import ROOT, WAIT_SECONDS, wait_until

DONE, REFUSED, BUSY = 0, 1, 3


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree that a developer edits."""
    tree = copy_tree(tmp_path / "tree")
    append(tree / "blueprints/orders.py", f"# {tmp_path}")
    return tree


def append(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}{line}\n")


def hold(tree: Path, until: Path) -> None:
    """Let a release be imported only when there is this file."""
    append(tree / "errors.py", f"import os, time\nwhile not os.path.exists({str(until)!r}):\n    time.sleep(0.05)")


def releases(server: Server) -> set[str]:
    return {path.name for path in (server.home / "releases").iterdir()}


def test_a_tree_goes_live_under_load_and_back_again(stage: Patched, server: Server, tree: Path) -> None:
    before = server.serves()
    append(tree / "blueprints/orders.py", "# one more line")

    with load(stage) as running:
        done = server.tool("patch", str(tree), "--watch", "1", BY="Li Lei")
        if "a request takes" in done.stdout:  # from new workers on a busy machine
            done = server.tool("patch", str(tree), "--watch", "1", BY="Li Lei")
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
    assert "another supervisor.py" not in done.stdout
    assert "by Li Lei: done" in status
    assert f"rollback to {before} by" in server.tool("status").stdout
    assert "  blueprints/orders.py +2 -0" in status.splitlines()
    assert back.returncode == DONE, back.stdout + back.stderr
    assert server.serves() == before


def test_a_tree_that_is_wrong_is_refused_and_says_where(server: Server, tree: Path) -> None:
    before, kept = server.serves(), releases(server)
    append(tree / "blueprints/orders.py", "def (")
    refused = server.tool("patch", str(tree))
    assert refused.returncode == REFUSED
    assert re.search(r"blueprints/orders\.py\D+\d+", refused.stdout + refused.stderr)
    assert refused.stdout.splitlines()[-1].startswith("serves: ")
    assert server.serves() == before
    assert releases(server) == kept


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

    def commit() -> str:
        append(tree / "blueprints/orders.py", "# in git")
        git = ["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@example.com"]
        for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "x"]):
            subprocess.run([*git, *words], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:12]

    script, is_clean = tree / "deploy/patch/patch.py", commit()
    anothers = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}  # as on a server, where root owns the tree
    folder = server.tool("patch", "--watch", "0", script=script, **anothers)
    assert folder.returncode == DONE, folder.stdout + folder.stderr
    assert is_clean in folder.stdout.splitlines()[-1]

    in_git = commit()
    append(tree / "blueprints/orders.py", "def (")  # which is not in the commit
    done = server.tool("patch", "HEAD", "--watch", "0", script=script, **anothers)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert in_git in done.stdout.splitlines()[-1]
    assert server.serves() not in (archived, is_clean)


@pytest.mark.parametrize("name", ["../outside", "kuaishang-0.1.0/link", "kuaishang-0.1.0/storage/link"])
def test_an_archive_that_would_leave_its_folder_is_refused(
    server: Server, tree: Path, tmp_path: Path, name: str
) -> None:
    kept, archive, member = releases(server), tmp_path / "release.tar.gz", tarfile.TarInfo(name)
    if name.endswith("link"):
        member.type, member.linkname = tarfile.SYMTYPE, "../../../.env" if "storage" in name else str(server.home)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, "kuaishang-0.1.0")
        tar.addfile(member)
    refused = server.tool("patch", str(archive))
    assert refused.returncode == REFUSED
    assert ("leads out" if name.endswith("link") else "cannot be unpacked") in refused.stdout
    assert releases(server) == kept


def test_what_runs_already_is_not_deployed_again(server: Server, tree: Path) -> None:
    assert server.tool("patch", str(tree), "--watch", "0").returncode == DONE
    again = server.tool("patch", str(tree), "--watch", "0")
    assert again.returncode == REFUSED
    assert "identical to the running release" in again.stdout


def test_one_patch_at_a_time(server: Server, tree: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(server.tool, "patch", str(tree), "--watch", "3")
        wait_until(lambda: json.loads(server.state.read_text())["provisional"])
        assert server.tool("patch", str(tree)).returncode == BUSY
    assert first.result().returncode == DONE


def test_a_supervisor_that_is_busy_is_asked_before_anything_is_done(server: Server, tree: Path) -> None:
    other, kept = server.release(), releases(server)
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(server.patch, other, 3)  # without the lock of patch.py
        wait_until(lambda: json.loads(server.state.read_text())["provisional"])
        busy = server.tool("patch", str(tree))
    assert busy.returncode == BUSY, busy.stdout + busy.stderr
    assert "busy: a patch by the test is going on" in busy.stdout
    assert "copied" not in busy.stdout
    assert releases(server) >= kept
    assert first.result()["end"] == "done"


def test_another_supervisor_in_a_release_is_announced(server: Server, tree: Path) -> None:
    append(tree / patch.SUPERVISOR, "# a new one")
    done = server.tool("patch", str(tree), "--watch", "0")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert f"cp {server.home}/current/{patch.SUPERVISOR} {server.home}/ && systemctl restart" in done.stdout


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
    first = server.state.read_text()
    append(tree / "blueprints/orders.py", "# one more line")
    refused = server.tool("patch", str(tree))
    assert refused.returncode == REFUSED
    assert "nobody would watch" in refused.stdout
    assert server.state.read_text() == first
    assert server.current() == json.loads(first)["current"]
    try:
        server.start()
        assert server.serves() in done.stdout.splitlines()[-1]
    finally:
        server.discard()


def test_a_supervisor_that_restarts_lets_no_release_pass_unwatched(server: Server, tree: Path, tmp_path: Path) -> None:
    before, state, kept = server.serves(), server.state.read_text(), releases(server)
    hold(tree, tmp_path / "go")
    with ThreadPoolExecutor(1) as executor:
        patched = executor.submit(server.tool, "patch", str(tree))
        wait_until(lambda: releases(server) != kept)
        server.process.kill()
        (tmp_path / "go").touch()
        refused = patched.result()
    server.start()
    assert refused.returncode == REFUSED
    assert "nobody would watch" in refused.stdout
    assert (server.state.read_text(), server.serves()) == (state, before)
    assert releases(server) == kept


def test_a_folder_that_is_not_ours_is_refused_in_a_line(tmp_path: Path, server: Server) -> None:
    nowhere = Server.__new__(Server)
    nowhere.home, nowhere.environ = tmp_path / "nowhere", server.environ
    for words in (["patch"], ["rollback"]):
        refused = nowhere.tool(*words)
        assert refused.returncode == REFUSED
        assert "there is no folder" in refused.stdout
    assert "nothing" in nowhere.tool("status").stdout


@pytest.mark.skipif(os.getuid() != 0, reason="needs a folder of another user")
def test_root_is_told_whose_folder_it_is_and_leaves_nothing_there(server: Server, tmp_path: Path) -> None:
    anothers = Server.__new__(Server)
    anothers.home, anothers.environ = tmp_path / "home", server.environ
    anothers.home.mkdir()
    shutil.chown(anothers.home, "nobody")
    for words in (["patch"], ["rollback"]):
        refused = anothers.tool(*words)
        assert refused.returncode == REFUSED
        assert f"{anothers.home} belongs to nobody: runuser -u nobody" in refused.stdout
    assert list(anothers.home.iterdir()) == []


def test_a_line_of_the_history_that_is_cut_off_is_left_out(server: Server) -> None:
    release = server.release()
    server.patch(release)
    with (server.home / "history.jsonl").open("ab") as history:
        history.write('{"at": "2026-01-01T00:00:00Z", "by": "李'.encode()[:-1])
    status = server.tool("status")
    with (server.home / "history.jsonl").open("ab") as history:
        history.write(b"\n")
    assert (status.returncode, status.stderr) == (0, "")
    assert f"patch {release} by the test: done" in status.stdout


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


def test_a_rollback_while_a_patch_is_checked_ends_it(server: Server, tree: Path, tmp_path: Path) -> None:
    first, second = server.serves(), server.release()
    server.patch(second)
    kept = releases(server)
    hold(tree, tmp_path / "go")
    with ThreadPoolExecutor(1) as executor:
        patched = executor.submit(server.tool, "patch", str(tree))
        wait_until(lambda: releases(server) != kept)
        assert server.tool("rollback").returncode == DONE
        (tmp_path / "go").touch()
        refused = patched.result()
    assert refused.returncode == REFUSED
    assert "a rollback was asked for" in refused.stdout
    assert "migrated" not in refused.stdout
    assert server.serves() == first
    assert releases(server) == kept


@pytest.mark.parametrize(
    ("file", "content"),
    [("settings.py", "# 设置".encode("gbk")), ("requirements.txt", None), ("environment", b"")],
    ids=["GBK", "no requirements", "an environment"],
)
def test_a_strange_tree_is_refused_in_a_line(
    server: Server, tree: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    before, kept, archive = server.serves(), releases(server), tmp_path / "release.tar.gz"
    (tree / file).unlink(missing_ok=True)
    if content is not None:
        (tree / file).write_bytes(content)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, "kuaishang")
    refused = server.tool("patch", str(archive))
    assert (refused.returncode, refused.stderr) == (REFUSED, "")
    assert refused.stdout.splitlines()[-2].startswith("refused: ")
    assert before in refused.stdout.splitlines()[-1]
    assert (server.serves(), releases(server)) == (before, kept)


def test_a_damaged_home_can_be_patched_and_a_stray_file_stays(server: Server, tree: Path) -> None:
    before, stray = server.serves(), server.home / "releases" / "backup.tar.gz"
    stray.touch()
    shutil.rmtree(server.home / "releases" / before)
    done = server.tool("patch", str(tree), "--watch", "0")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert server.serves() in done.stdout.splitlines()[-1]
    stray.unlink()


def test_what_was_handed_over_goes_on_without_whoever_asked(server: Server, tree: Path, tmp_path: Path) -> None:
    hold(tree, tmp_path / "go")
    (tmp_path / "go").touch()
    command = [sys.executable, str(ROOT / "deploy/patch/patch.py"), "patch", str(tree), "--home", str(server.home)]
    asked = subprocess.Popen(
        [*command, "--watch", "3"],
        env=server.environ,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell in the background ignores
    )
    wait_until(lambda: json.loads(server.state.read_text())["provisional"])
    asked.send_signal(signal.SIGINT)
    said, _ = asked.communicate(timeout=WAIT_SECONDS)
    assert asked.returncode == 130
    assert "interrupted, but the supervisor goes on" in said
    release = wait_until(
        lambda: not (state := json.loads(server.state.read_text()))["provisional"] and state["current"]
    )
    assert server.serves() in release


def test_the_settings_of_the_file_count_not_those_of_a_shell(server: Server, tree: Path) -> None:
    done = server.tool("patch", str(tree), "--watch", "0", SECRET_KEY="short")
    assert done.returncode == DONE, done.stdout + done.stderr


def test_no_commit_is_named_for_what_is_not_in_it(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "releases").mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    (tmp_path / ".gitignore").write_text("*\n")
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "x"]):
        subprocess.run([*git, *words], check=True)
    release = patch.take(tmp_path, str(tree), "x", None)
    assert patch.about(release)["commit"] == patch.content(tree)[:12]


def test_a_second_rollback_does_not_lead_past_a_column_that_is_gone(stage: Patched, tmp_path: Path, tree: Path) -> None:
    home, with_column, without = (tmp_path / "home", *map(copy_tree, (tmp_path / "with", tmp_path / "without")))
    server = Server(home, stage.server.environ | {"PORT": ""}, released=False, **stage.secrets)
    for folder, version in ((with_column, "0.1.0"), (without, "0.2.0"), (tree, "0.3.0")):
        settings = (folder / "settings.py").read_text()
        (folder / "settings.py").write_text(settings.replace('VERSION = "0.1.0"', f'VERSION = "{version}"'))
    add_migration(tree, 'op.drop_column("orders", "remark")', OLD_CODE_LEFT_IN="0.2.0")
    shutil.copytree(with_column, home / "releases" / "one")
    shutil.copytree(tree, home / "releases" / "refused")  # it has migrated, and did not start
    shutil.copytree(without, home / "releases" / "two")
    for name in ("one", "two"):
        (home / "releases" / name / "environment").symlink_to(Path(sys.prefix))
    server.state.write_text(json.dumps({"current": "two", "provisional": "", "previous": ["one"]}))
    refused = server.tool("rollback")
    assert refused.returncode == REFUSED
    assert "drop_column" in refused.stdout


def test_an_environment_is_made_with_hashes_also_of_what_builds(
    server: Server, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        Path(command[2]).mkdir(parents=True)
        commands.append([*command[1:3], Path(command[3]).read_text(), *command[4:], options["cwd"]])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(patch.subprocess, "run", run)
    name = patch.environment(tmp_path, tree)
    [[script, folder, tools, *rest]] = commands
    assert (script, folder, rest) == ("dev/install.py", f"{tmp_path}/environments/{name}", ["requirements.txt", tree])
    assert re.findall(r"^(\w+)==", tools, re.MULTILINE) == ["setuptools", "uv"]
    assert len(re.findall("--hash=sha256:", tools)) > 2
    assert "via" not in tools


def test_a_migration_that_fails_on_the_real_database_is_refused_and_no_request_fails(
    stage: Patched, server: Server, tree: Path
) -> None:
    engine = engine_for(stage.database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE taken (id INTEGER)"))  # by hand, so that no check knows of it
    before = server.serves()
    half, taken = (f'op.create_table("{name}", sa.Column("id", sa.Integer))' for name in ("half", "taken"))
    add_migration(tree, f"{half}\n{taken}")

    with load(stage) as running:
        refused = server.tool("patch", str(tree))
        serves_on = server.serves()
        with engine.begin() as connection:  # which SQLite keeps, as MySQL does
            connection.execute(text("DROP TABLE half"))
        add_migration(tree, half)
        done = server.tool("patch", str(tree), "--watch", "0")

    assert refused.returncode == REFUSED
    assert "alembic failed" in refused.stdout
    assert "taken already exists" in refused.stderr
    assert (serves_on, refused.stdout.splitlines()[-1].startswith("serves: ")) == (before, True)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert server.serves() != before
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    assert running.count_orders() == (0, 0)
