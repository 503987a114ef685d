"""The one file: what its first part unpacks, where, how often, and what it refuses; what `serve` starts; what goes in.

Here it is a small one; tests/deploy/one_file.py has the real one.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.binary import build, upgrades
from deploy.patch.supervisor import Refused
from dev.redis_server import CARRIED
from tests.deploy.systemd import needs_systemd, verify
from tests.harness import ROOT, WAIT_SECONDS

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


def put_copy(file: Path, called: Path, cache: Path) -> None:
    """Put a file where `serve` keeps the last one that proved itself, of those at a path."""
    place = cache / f"served-{zlib.crc32(os.fsencode(called)):08x}" / "releases" / "last"
    place.mkdir(parents=True)
    cache.chmod(0o700)
    shutil.copy(file, place / "kuaishang")
    (place.parents[1] / "current").symlink_to("releases/last")


@pytest.mark.parametrize("call", ["absolute", "./one"])
def test_serve_of_a_damaged_file_starts_the_copy_of_the_last_one(make: Made, cache: Path, call: str) -> None:
    file, last = make("one"), make("two")
    put_copy(last, file, cache)
    os.truncate(file, file.stat().st_size // 2)
    done = subprocess.run(
        [file if call == "absolute" else call, "serve"],
        env=environ(cache),
        cwd=file.parent,
        capture_output=True,
        text=True,
    )
    assert "is damaged or not complete" in done.stderr
    assert done.stdout.splitlines()[1] == "two"
    assert done.stdout.splitlines()[2].split()[1] == str(file)  # what it looks at for an upgrade
    assert start(file, cache, "check").returncode == 1


def test_serve_of_a_damaged_file_with_a_damaged_copy_ends(make: Made, cache: Path) -> None:
    file = make("one")
    os.truncate(file, file.stat().st_size // 2)
    assert start(file, cache, "serve").returncode == 1
    put_copy(file, file, cache)
    assert start(file, cache, "serve").returncode == 1


def test_another_build_leaves_the_copies(make: Made, cache: Path) -> None:
    first, second = make("one"), make("two")
    put_copy(first, first, cache)
    start(first, cache)
    start(second, cache)
    assert len([tree for tree in trees(cache) if tree.name.startswith("served-")]) == 1
    assert len(trees(cache)) == 2


FILE = """#!/bin/sh
case $1 in
--version) echo '{{"id": "{name}"}}' ;;
smoke) echo "$@" >>{asked}; echo refused: on purpose; exit {smoke} ;;
migrate) echo "$@" >>{asked} ;;
*) exit 1 ;;
esac
"""


class Starts:
    """Starts of `kuaishang serve` one after the other, without gunicorn."""

    def __init__(self, folder: Path) -> None:
        self.file, self.home, self.asked = folder / "kuaishang", folder / "cache" / "served", folder / "asked"
        self.home.mkdir(parents=True)

    def put(self, name: str, smoke: int = 0) -> None:
        self.file.write_text(FILE.format(name=name, asked=self.asked, smoke=smoke))
        self.file.chmod(0o755)

    def start(self) -> upgrades.OneFile:
        return upgrades.OneFile(self.file, self.home, "127.0.0.1", 0)

    def serves(self) -> str:
        return self.start().state.current

    def prove(self) -> None:
        (self.home / "unproved").unlink(missing_ok=True)


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starts]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(upgrades, "listen", lambda host, port: listener)
        yield Starts(tmp_path)


def errors(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return [line for line in lines if line["level"] == "ERROR"]


def test_a_start_serves_the_file(starts: Starts, capsys: pytest.CaptureFixture[str]) -> None:
    starts.put("one")
    assert [starts.serves() for _ in range(2)] == ["one", "one"]
    assert not starts.asked.exists()
    assert errors(capsys) == []


def test_without_a_copy_a_refused_file_does_not_start(starts: Starts) -> None:
    starts.file.write_text("<html>404</html>")
    with pytest.raises(Refused):
        starts.start()


def test_a_file_put_there_between_two_starts_is_checked_and_serves(
    starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    starts.put("one")
    starts.start()
    starts.put("two")
    assert starts.serves() == "two"
    asked = [f"smoke --seconds 50 --old {starts.home.parent}/one/app", "migrate"]  # not before the check
    assert starts.asked.read_text().splitlines() == asked
    starts.prove()
    assert starts.serves() == "two"
    starts.put("one")  # and back
    assert starts.serves() == "one"
    asked += [f"smoke --seconds 50 --migrations-only --old {starts.home.parent}/two/app"]
    assert starts.asked.read_text().splitlines() == asked
    assert errors(capsys) == []


@pytest.mark.parametrize("wrong", ["refused by the check", "no program", "gone"])
def test_a_refused_file_at_a_start_leaves_the_last_one(
    starts: Starts, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    starts.put("one")
    starts.start()
    starts.put("two", smoke=1)
    if wrong == "no program":
        starts.file.write_text("<html>404</html>")
    elif wrong == "gone":
        starts.file.unlink()
    assert [starts.serves() for _ in range(2)] == ["one", "one"]
    line, _ = errors(capsys)
    assert line["message"] == "serving the last file that proved itself, not the one at the path"
    assert Path(line["copy"]).read_text() == FILE.format(name="one", asked=starts.asked, smoke=0)


def test_a_file_that_was_taken_back_does_not_start(starts: Starts, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor one that was being watched when the machine stopped."""
    starts.put("one")
    running = starts.start()
    starts.put("two")
    assert running.take() == "two"  # at SIGHUP
    assert [starts.serves() for _ in range(2)] == ["one", "one"]
    assert "was tried before" in errors(capsys)[0]["reason"]
    starts.put("three")
    assert starts.serves() == "three"


def test_a_file_that_ended_before_it_had_proved_itself_does_not_start_again(
    starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    starts.put("one")
    starts.start()
    starts.put("two")
    assert [starts.serves() for _ in range(3)] == ["two", "one", "one"]
    assert "was tried before" in errors(capsys)[0]["reason"]


@pytest.fixture
def same_umask() -> Iterator[None]:
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)  # the supervisor changes it


@pytest.mark.usefixtures("same_umask")
def test_a_file_that_does_not_start_gives_way_to_the_last_one(
    starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    starts.put("one")
    starts.start()
    starts.put("two")
    served = starts.start()
    assert served.state.current == "two"

    async def run() -> None:
        running = asyncio.create_task(served.run())
        async with asyncio.timeout(30):
            while served.state.current == "two":
                await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await running

    asyncio.run(run())
    assert any("does not start" in line.get("reason", "") for line in errors(capsys))
    assert starts.serves() == "one"


@pytest.mark.parametrize(
    ("environment", "file", "address"),
    [
        ({"HOST": "", "PORT": " "}, "HOST=127.0.0.1\nPORT=8123\n", ("127.0.0.1", 8123)),
        ({"PORT": ""}, "PORT=\n", ("0.0.0.0", 8000)),
        ({"PORT": "8124"}, "PORT=8123\n", ("0.0.0.0", 8124)),
    ],
)
def test_an_empty_variable_counts_as_not_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    file: str,
    address: tuple[str, int],
) -> None:
    given: list[tuple[str, int]] = []

    def refuse(file: Path, home: Path, host: str, port: int) -> None:
        given.append((host, port))
        raise Refused("enough")

    for name in ("HOST", "PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".env").write_text(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENV_FILE", ".env")
    monkeypatch.setattr(upgrades, "OneFile", refuse)
    with pytest.raises(SystemExit, match="enough"):
        upgrades.serve(tmp_path / "kuaishang", tmp_path)
    assert given == [address]


def test_two_processes_of_a_file_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes: list[Path] = []

    def nested(file: Path, home: Path, host: str, port: int) -> None:
        homes.append(home)
        if len(homes) == 1:
            with pytest.raises(SystemExit, match="enough"):
                upgrades.serve(file, tmp_path)
        raise Refused("enough")

    monkeypatch.setattr(upgrades, "OneFile", nested)
    with pytest.raises(SystemExit, match="enough"):
        upgrades.serve(tmp_path / "kuaishang", tmp_path)
    assert [home.name.partition("-")[0] for home in homes] == ["served", "serve"]
    assert list(tmp_path.iterdir()) == homes[:1]


def test_the_sources_are_all_that_the_service_imports() -> None:
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "--",
            ":(glob)*.py",
            "openapi*.json",
            "blueprints",
            "dev",
            "storage",
            "telemetry",
            "wechat",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    inside = {str(path) for path in build.sources()}
    assert set(listed) - inside == {"storage/migrations/script.py.mako"}  # of which a new migration is made
    assert {"pyproject.toml", "requirements.txt", "deploy/binary/kuaishang.py", "deploy/patch/check.py"} <= inside
    assert {"openapi.json", "openapi.en.json", *(f"blueprints/docs.{kind}" for kind in ("html", "js", "css"))} <= inside
    assert "deploy/docker/healthcheck.py" not in inside


def test_what_goes_in_has_the_command_for_the_keys(environ: dict[str, str], tmp_path: Path) -> None:
    """By its own modules, not those in the folder where it is called."""
    build.copy_app(tmp_path / "app")
    for module in ("service", "settings", "wsgi"):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('not ours')")
    command = [sys.executable, "-P", tmp_path / "app" / "deploy" / "binary" / "kuaishang.py", "keys", "status"]
    env = {**environ, "KUAISHANG_FILE": str(tmp_path / "file"), "PATH": os.defpath}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", CARRIED)
def test_the_redis_server_of_either_wheel_goes_in_with_its_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    program = tmp_path / package / CARRIED[package].replace("*", "linux-x86_64")
    program.parent.mkdir(parents=True)
    program.touch()
    there = SimpleNamespace(origin=str(tmp_path / package / "__init__.py"))
    monkeypatch.setattr(build.util, "find_spec", lambda name: there if name == package else None)
    assert build.redis_server() == program
    assert (build.HERE / "licences" / f"{program.name}.txt").is_file()


@needs_systemd
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (build.HERE / "kuaishang.service").read_text()
    assert "\nExecStart=/opt/kuaishang/kuaishang serve\n" in unit
    copy = tmp_path / "kuaishang.service"
    copy.write_text(unit.replace("/opt/kuaishang/kuaishang", "/bin/true"))  # which exists
    verify(copy, ours=copy.name)
