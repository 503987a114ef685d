"""The first part of the one file: what it unpacks, where, how often, and what it refuses. Here it is a small one."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.binary import build

pytestmark = pytest.mark.skipif(
    not (shutil.which("cc") and Path("/usr/include/zlib.h").exists()), reason="needs gcc and zlib1g-dev"
)
PYTHON = """#!/bin/sh
echo "$0 $@"
echo "{version}"
echo "$PWD $KUAISHANG_FILE $LD_LIBRARY_PATH ${{PYTHONHOME-unset}}"
[ "$3" != wait ] || read line
"""


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build.compile_stub(tmp_path_factory.mktemp("stub"))


Made = Callable[[str], Path]


@pytest.fixture
def make(stub: bytes, tmp_path: Path) -> Made:
    """Make a file whose Python prints its version."""

    def made(version: str) -> Path:
        tree = tmp_path / f"tree-{version}"
        (tree / "bin").mkdir(parents=True)
        (tree / "bin" / "python3").write_text(PYTHON.format(version=version))
        (tree / "bin" / "python3").chmod(0o755)
        deep = tree.joinpath("lib", *["a-folder-with-a-long-name"] * 6)
        deep.mkdir(parents=True)
        for size in (0, 1, 512, 513, 2**18, 2**18 + 1, 2**19 + 700):
            (deep / str(size)).write_bytes(os.urandom(size))
        file = tmp_path / version
        file.write_bytes(build.seal(stub, build.pack(tree)))
        file.chmod(0o755)
        return file

    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kuaishang"


def environ(cache: Path, **more: str) -> dict[str, str]:
    cache.parent.mkdir(exist_ok=True)
    return {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(cache.parent), **more}


def start(file: Path | str, cache: Path, *words: str, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [file, *words], env=environ(cache, **options), cwd=cache.parent, capture_output=True, text=True
    )


def trees(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


def files(tree: Path) -> dict[str, tuple[bool, bytes | None]]:
    return {
        str(path.relative_to(tree)): (os.access(path, os.X_OK), path.read_bytes() if path.is_file() else None)
        for path in tree.rglob("*")
    }


def test_a_start_unpacks_all_and_runs_python(make: Made, cache: Path, tmp_path: Path) -> None:
    done = start(make("one"), cache, "keys", "two words", PYTHONHOME="/elsewhere")
    (tree,) = trees(cache)
    assert files(tree) == files(tmp_path / "tree-one")
    assert done.stdout.splitlines() == [
        f"{tree}/bin/python3 -I {tree}/app/deploy/binary/kuaishang.py keys two words",
        "one",
        f"{cache.parent} {tmp_path / 'one'} {tree}/lib unset",
    ]
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_second_start_unpacks_nothing(make: Made, cache: Path) -> None:
    file = make("one")
    start(file, cache)
    (tree,) = trees(cache)
    (tree / "mark").touch()
    assert start(file, cache).stdout.splitlines()[1] == "one"
    assert (tree / "mark").exists()


def test_the_file_is_known_by_the_path_of_its_call(make: Made, cache: Path, tmp_path: Path) -> None:
    make("one")
    (tmp_path / "current").symlink_to("one")
    for call in (tmp_path / "current", "../current"):
        known = start(call, cache).stdout.splitlines()[2].split()[1]
        assert os.path.abspath(known) == str(tmp_path / "current")


@pytest.mark.parametrize("part", [0.999, 0.7, 0.5])
def test_a_file_that_is_not_complete_is_refused(make: Made, cache: Path, part: float) -> None:
    file = make("one")
    os.truncate(file, int(file.stat().st_size * part))
    done = start(file, cache)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"kuaishang: {file} is damaged or not complete; copy it again\n"
    assert trees(cache) == []


@pytest.mark.parametrize("where", [-900_000, -1000, -64, -50, -20])
def test_a_damaged_file_is_refused_although_it_has_run(make: Made, cache: Path, where: int) -> None:
    file = make("one")
    assert start(file, cache).returncode == 0
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)
    done = start(file, cache)
    assert (done.returncode, done.stdout) == (1, "")
    assert "damaged" in done.stderr


def test_many_first_starts_at_once_unpack_once(make: Made, cache: Path) -> None:
    file = make("one")
    started = [
        subprocess.Popen([file], env=environ(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(20)
    ]
    said = [process.communicate() for process in started]
    assert len(trees(cache)) == 1
    assert {out.splitlines()[1] for out, _ in said} == {"one"}
    assert {errors for _, errors in said} == {""}


def test_what_a_killed_start_left_is_not_used(make: Made, cache: Path) -> None:
    (cache / ".new" / "bin").mkdir(parents=True)
    (cache / ".new" / "bin" / "python3").write_text("#!/bin/sh\necho half")
    cache.chmod(0o700)
    assert start(make("one"), cache).stdout.splitlines()[1] == "one"
    assert [tree.name[0] for tree in trees(cache)] != ["."]


def test_another_build_removes_what_nobody_runs_from(make: Made, cache: Path) -> None:
    first, second, third = make("one"), make("two"), make("three")
    with subprocess.Popen(
        [first, "wait"], env=environ(cache), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout
        assert waiting.stdout.readline()
        (used,) = trees(cache)
        start(second, cache)
        assert used in trees(cache)
        start(third, cache)
        assert used in trees(cache)
        assert len(trees(cache)) == 2  # nobody runs from the second
        waiting.communicate("\n")
    start(second, cache)
    (left,) = trees(cache)
    assert left != used


def test_a_start_waits_for_a_removal_and_unpacks_again(make: Made, cache: Path) -> None:
    first, second = make("one"), make("two")
    for _ in range(10):
        both = [
            subprocess.Popen([file], env=environ(cache), stdout=subprocess.PIPE, text=True) for file in (first, second)
        ]
        assert [process.communicate()[0].splitlines()[1] for process in both] == ["one", "two"]


@pytest.mark.parametrize("unfit", ["for others to write", "a link", "a file"])
def test_a_folder_that_others_may_write_to_is_not_used(make: Made, cache: Path, tmp_path: Path, unfit: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    cache.parent.mkdir()
    if unfit == "a link":
        (tmp_path / "other").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "other")
    elif unfit == "a file":
        cache.touch()
    else:
        cache.mkdir()
        cache.chmod(0o777)
    started = start(make("one"), cache, HOME=str(home)).stdout.splitlines()[0]
    assert started.startswith(f"{home}/.cache/kuaishang/")


def test_without_a_home_it_unpacks_to_a_folder_of_the_user_under_var_tmp(make: Made, tmp_path: Path) -> None:
    done = subprocess.run([make("one")], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    tree = re.match(rf"(/var/tmp/kuaishang-{os.geteuid()}/\w+)/bin/python3 ", done.stdout)
    assert tree, done
    shutil.rmtree(tree[1])


def test_a_start_that_cannot_unpack_says_so_and_leaves_nothing(make: Made, cache: Path) -> None:
    file = make("one")
    done = subprocess.run(
        ["sh", "-c", 'trap "" XFSZ; ulimit -f 512; exec "$0"', file], env=environ(cache), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r"kuaishang: cannot write lib/\S+: File too large\n", done.stderr)
    assert trees(cache) == []
