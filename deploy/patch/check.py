"""Check a release apart, before it may serve. In the folder of the release, with the Python that it is to run on:

    python deploy/patch/check.py [--old DIR] [--env-file FILE] [--seconds 20]

It prints a line for each step, and last `ok in 3.1 s` (exit status 0) or `refused: …` with what is wrong and where
(exit status 1):

    compiles    every .py file of the service; not those of tests/ and bench/
    settings    the environment and FILE have all that settings.py of the release requires
    migrations  one chain of revisions; those that DIR, the release that serves now, has as well are the same there,
                the others are safe beside its code: see storage/migrations/env.py
    smoke       the release migrates a database and serves: probes, a login, an order. Redis, the database (SQLite) and
                WeChat are private ones, as is the environment: no real secret or address is in it. If the revisions of
                DIR are others, it serves the same database before and after the migration.

A release may do anything: hang, crash, or take all memory. So none of its code runs in this process. What runs has
limits, is the first that the kernel kills when memory runs out, is killed at the end, and writes into a temporary
folder. This file and those beside it need nothing but the standard library.
"""

import argparse
import os
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

sys.dont_write_bytecode = True  # into the release
del sys.path[0]  # the folder of this file
sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: no file of the release replaces a library's

from deploy.patch.migrations import check_migrations
from deploy.patch.programs import Refused, Workshop
from deploy.patch.smoke import Smoke

NOT_OF_THE_SERVICE = {"bench", "build", "dist", "node_modules", "tests", "var"}
SETTINGS = {"WECHAT_APP_ID", "REDIS_URL", "DATABASE_URL"}
"""Where none of these is, there are no settings."""


class Options(argparse.Namespace):
    old: Path | None
    env_file: Path | None
    seconds: float
    memory: int
    without_smoke: bool
    migrations_only: bool


def main() -> int:
    options, began = read_options(), time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: refuse(f"stopped by {signal.Signals(number).name}"))
    signal.signal(signal.SIGALRM, lambda *_: refuse(f"not finished after {options.seconds:g} s"))
    signal.setitimer(signal.ITIMER_REAL, options.seconds + 1)  # if nothing else notices
    try:
        with closing(Workshop(options.seconds, options.memory)) as workshop:
            try:
                check(Path.cwd(), options, workshop)
            finally:
                ignore_signals()
        outcome, status = f"ok in {time.monotonic() - began:.1f} s", 0
    except (Refused, OSError) as error:
        outcome, status = f"refused: {error}", 1
    print(outcome, flush=True)
    return status


def read_options() -> Options:
    parser = argparse.ArgumentParser(description="Check the release in this folder, before it may serve.")
    parser.add_argument("--old", type=Path, metavar="DIR", help="the release that serves now")
    parser.add_argument("--env-file", type=Path, metavar="FILE", help="the settings to serve with; default: ENV_FILE")
    parser.add_argument("--seconds", type=float, default=20, help="how long all of it may take (default: 20)")
    limit = os.environ.get("MEMORY_MB", "1024")  # as supervisor.py has it
    parser.add_argument("--memory", type=int, default=limit, metavar="MB", help="for each process (default: MEMORY_MB)")
    parser.add_argument(
        "--without-smoke", action="store_true", help="do not run the release, where there is no redis-server"
    )
    parser.add_argument("--migrations-only", action="store_true", help="that step alone, as before a rollback")
    options = parser.parse_args(namespace=Options())
    if options.old:
        if not options.old.is_dir():
            parser.error(f"there is no folder {options.old}")
        options.old = options.old.resolve()
    if options.env_file and not options.env_file.is_file():
        parser.error(f"there is no file {options.env_file}")
    return options


def refuse(why: str) -> None:
    raise Refused(why)


def ignore_signals() -> None:
    """Let nothing disturb the end."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def check(release: Path, options: Options, workshop: Workshop) -> None:
    """Run the steps.

    :raises Refused: at the first one that finds something wrong.
    """
    if not options.migrations_only:
        with step("compiles") as results:
            results.append(f"{compile_all(release)} files")
        with step("settings") as results:
            results.append(check_settings(release, options.env_file, workshop))
    with step("migrations") as results:
        says, differ = check_migrations(release, options.old)
        results.append(says)
    if options.migrations_only:
        return
    if options.without_smoke:
        print("smoke        skipped: whether the release can serve is not known")
        return
    smoke = Smoke(release, options.old if differ else None, workshop)
    if differ:
        with step("before") as results:
            results.append(smoke.serve_before())
    with step("migrate") as results:
        results.append(smoke.migrate())
    with step("serve") as results:
        results.append(smoke.serve())


@contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Time a step, and print its line with the result."""
    began = time.monotonic()
    results: list[str] = []
    try:
        yield results
    finally:
        print(f"{name:<11}{time.monotonic() - began:5.1f} s  {'; '.join(results) or 'failed'}", flush=True)


def compile_all(release: Path) -> int:
    """Compile all files in memory, and return their number.

    :raises Refused: with every error.
    """
    warnings.simplefilter("ignore")
    files, errors = list(python_files(release)), []
    for path in files:
        name = path.relative_to(release)
        try:
            compile(path.read_bytes(), name, "exec", dont_inherit=True)
        except SyntaxError as error:
            where = f"{name}:{error.lineno}" if error.lineno else name
            errors.append(f"{where}: {type(error).__name__}: {error.msg}")
        except (ValueError, RecursionError, MemoryError, OSError) as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")
    if errors:
        raise Refused("\n    ".join(errors))
    return len(files)


def python_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not (path.name.startswith(".") or path.name in NOT_OF_THE_SERVICE or (path / "pyvenv.cfg").exists()):
                yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def check_settings(release: Path, env_file: Path | None, workshop: Workshop) -> str:
    """Let settings.py of the release read what it will be served with.

    :raises Refused: with the list of what is missing or malformed.
    """
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if env_file:
        environ["ENV_FILE"] = str(env_file.resolve())
    if not ("ENV_FILE" in environ or (release / ".env").exists() or environ.keys() & SETTINGS):
        return "skipped: neither the environment nor a file has any"
    mark = secrets.token_hex(8)  # which nobody prints who exits before the end, with whatever status
    command = [sys.executable, "-c", f"import settings; settings.load(); print('{mark}')"]
    program = workshop.start("settings.py", command, release, environ)
    program.wait()
    if not program.text().endswith(mark):
        raise Refused(program.failure())
    return "complete"


if __name__ == "__main__":
    sys.exit(main())
