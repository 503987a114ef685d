"""Patches a running service, goes back, and says what was deployed.

    python3 patch.py patch [FROM]     FROM: a folder, a .tar.gz, or a git ref of this repository; default: this tree
    python3 patch.py rollback         back to the release before, within a second; again, in some, for the one before
    python3 patch.py status           what serves, and what was deployed when, by whom, with what in it

`--home` or KUAISHANG_HOME is the folder of the installation, by default /srv/kuaishang. Run it as the user whom the
service runs as. Needs nothing but Python 3.11 (and git for a git ref); `make patch`, `make rollback` and
`make patch-status` call it.

A patch is copied to `releases/`, checked apart (check.py), migrated, and handed to the supervisor, which starts it
beside what serves, lets it take over without dropping a request, watches it for `--watch` seconds, and goes back by
itself if it is worse. Until then a crash or reboot brings back what served before.

While the service is not running nobody watches, so then only the first release is taken.

Exit status: 0 it serves; 1 refused, nothing has changed; 2 wrong arguments; 3 another patch, rollback or reload is
going on; 4 it served, was worse, and what served before serves again; 130 interrupted.
"""

import argparse
import difflib
import fcntl
import getpass
import hashlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # into the tree
sys.path.append(str(Path(__file__).resolve().parents[2]))

from deploy.patch.supervisor import State, read_env
from dev.install import pins_of

TREE = Path(__file__).resolve().parents[2]
SUPERVISOR = "deploy/patch/supervisor.py"
NOT_DEPLOYED = {"var", "dist", "node_modules", "environment", "release.json", "__pycache__"}
"""These stay behind, and so does each name that begins with a dot."""
DONE, REFUSED, BUSY, WENT_BACK, INTERRUPTED = 0, 1, 3, 4, 130
CHECK_SECONDS, MIGRATION_SECONDS, INSTALL_SECONDS = 40, 600, 600
UNWATCHED = """\
the service is not running, or restarts, so nobody would watch this release. Start it, even if it cannot
serve with what it has (systemctl start --no-block kuaishang), and try again"""
ANOTHER_SUPERVISOR = f"""\
This release has another supervisor.py than the one that runs. When a second without service does no harm, as root:
cp {{home}}/current/{SUPERVISOR} {{home}}/ && systemctl restart kuaishang"""
GOES_ON = "interrupted, but the supervisor goes on: `status` says what came of it, and `rollback` ends it"
SHOWN = 20
"""How many entries of the history, and files of each, `status` shows."""


class Failed(Exception):
    """Why nothing has changed."""


class Interrupted(Exception):
    """Nobody waits for the supervisor any more."""


class Steps:
    """Prints each step with the seconds that it took."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def __call__(self, words: str) -> None:
        now = time.monotonic()
        print(f"{now - self._last:6.2f} s  {words}", flush=True)
        self._last = now

    def seconds(self) -> float:
        return time.monotonic() - self._began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["patch", "rollback", "status"])
    parser.add_argument("source", nargs="?", default=os.environ.get("FROM") or str(TREE), metavar="FROM")
    parser.add_argument("--home", type=Path, default=os.environ.get("KUAISHANG_HOME") or "/srv/kuaishang")
    parser.add_argument("--watch", type=float, default=os.environ.get("WATCH_SECONDS") or 30, help="seconds")
    parser.add_argument("--by", default=os.environ.get("BY") or user(), help="who deploys it; or BY")
    asked = parser.parse_args()
    home = asked.home.resolve()
    steps = Steps()
    try:
        if asked.what == "status":
            return status(home)
        refuse_others(home)
    except (Failed, OSError) as error:
        print(f"refused: {error}")
        sys.exit(REFUSED)
    try:
        with alone(home, asked.what):
            ended = rollback(home, asked.by) if asked.what == "rollback" else patch(home, asked, steps)
    except BlockingIOError:
        print("busy: another patch is going on")
        ended = BUSY
    except (Failed, OSError, ValueError, RuntimeError) as error:  # it may be a strange tree
        print(f"refused: {error if isinstance(error, Failed) else repr(error)}")
        ended = REFUSED
    except KeyboardInterrupt:
        print("interrupted: what serves has not changed")
        ended = INTERRUPTED
    except Interrupted:
        print(GOES_ON)
        ended = INTERRUPTED
    print(f"serves: {named(home, state(home).current)}; {steps.seconds():.1f} s in all")
    sys.exit(ended)


def user() -> str:
    """Return who has logged in, also behind sudo or runuser."""
    if name := os.environ.get("SUDO_USER"):
        return name
    with suppress(OSError):  # there was no login
        return os.getlogin()
    return getpass.getuser()


def refuse_others(home: Path) -> None:
    """Raise Failed if another user owns the installation, who could not replace what this one leaves there."""
    if not home.is_dir():
        raise Failed(f"there is no folder {home}: create it, or name another one with --home")
    owner = home.stat().st_uid
    if owner != os.getuid():
        name = next((one.pw_name for one in pwd.getpwall() if one.pw_uid == owner), owner)
        raise Failed(f"{home} belongs to {name}: runuser -u {name} -- …")


@contextmanager
def alone(home: Path, what: str) -> Iterator[None]:
    """Let one patch be made at a time. A rollback may come in the middle of one: it ends it."""
    with (home / "patch.lock").open("w") as lock:
        if what == "patch":
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def patch(home: Path, asked: argparse.Namespace, steps: Steps) -> int:
    current = state(home).current
    print(f"runs:   {named(home, current)}")
    supervisor = ask(home, print, do="status", by=asked.by)
    if supervisor and supervisor.get("busy"):
        return ended({"end": "busy", "why": f"{supervisor['busy']} is going on"})
    if supervisor is None and current:
        raise Failed(UNWATCHED)
    before = home / "releases" / current
    old = before if current and before.is_dir() else None
    release = take(home, asked.source, asked.by, old)
    try:
        steps(f"copied to {release}: {described(release)}")
        if old and supervisor and supervisor.get("serves") and content(release) == content(old):
            raise Failed("identical to the running release")
        steps(f"virtual environment {environment(home, release)}")
        check(home, release, *beside(old))
        run_in(home, release, "-m", "compileall", "-q", "-x", "environment|tests/|bench/", ".")
        steps("checked")
        refuse_change(home, current)
        run_in(home, release, "-m", "alembic", "upgrade", "head")
        steps("migrated")
        refuse_change(home, current)
    except BaseException:
        remove(release)
        raise
    answer = ask(home, steps, do="patch", release=release.name, watch=asked.watch, by=asked.by)
    if answer is None and current:
        remove(release)
        raise Failed(UNWATCHED)
    if answer is None:
        State(home / "state.json", release.name).save()
        print("the service is not running; it starts with this release: systemctl start kuaishang")
        return DONE
    if answer["end"] == "done":  # or else its last requests may still need its files
        prune(home)
        ours = hashlib.sha256((release / SUPERVISOR).read_bytes()).hexdigest()
        if supervisor is not None and supervisor.get("program") != ours:
            print(ANOTHER_SUPERVISOR.format(home=home))
    return ended(answer)


def refuse_change(home: Path, current: str) -> None:
    """Raise Failed if another release is current by now: whoever goes back wants this patch no more."""
    if state(home).current != current:
        raise Failed("a rollback was asked for meanwhile")


def rollback(home: Path, by: str) -> int:
    known = state(home)
    if (before := known.kept()) and not known.provisional:  # there is no way back past a column that is gone
        folder = home / "releases"
        newest = max(folder.glob("*/storage/migrations/versions/[0-9]*.py"), key=lambda path: path.name, default=None)
        check(home, folder / before[0], "--migrations-only", *beside(newest and newest.parents[3]))
    answer = ask(home, print, do="rollback", by=by)
    if answer is None:
        raise Failed("the service is not running")
    return ended(answer)


def ended(answer: dict[str, Any]) -> int:
    if answer["end"] == "done":
        return DONE
    print(f"{answer['end']}: {answer['why']}")
    return {"went back": WENT_BACK, "busy": BUSY}.get(answer["end"], REFUSED)


def status(home: Path) -> None:
    known = state(home)
    print(f"serves:      {named(home, known.current)}")
    if known.provisional:
        print(f"on its way:  {named(home, known.provisional)}")
    for release in known.previous:
        print(f"before:      {named(home, release)}")
    with suppress(FileNotFoundError):
        for line in (home / "history.jsonl").read_text(errors="replace").splitlines()[-SHOWN:]:
            try:
                entry = json.loads(line)
            except ValueError:  # the machine crashed while it was written
                continue
            what = f"{entry['what']} {entry.get('release') or 'to ' + entry['serves']}"
            print(f"\n{entry['at']} {what} by {entry['by']}: {entry['end']} after {entry['seconds']} s")
            if entry.get("why"):
                print(f"  {entry['why']}")
            differs = about(home / "releases" / (entry["release"] or "none")).get("diff", [])
            print(*(f"  {one}" for one in differs[:SHOWN]), sep="\n")
            if differs[SHOWN:]:
                print(f"  and {len(differs) - SHOWN} more files")


def take(home: Path, source: str, by: str, old: Path | None) -> Path:
    """Copy what is to be deployed to a folder of its own. Raises Failed."""
    draft = home / "releases" / f"draft-{os.getpid()}"
    draft.mkdir(parents=True)
    commit = ""
    try:
        if Path(source, "wsgi.py").is_file():
            shutil.copytree(source, draft, dirs_exist_ok=True, ignore=lambda _, names: set(filter(stays, names)))
            is_clean = git(source, "status", "--porcelain") == git(source, "rev-parse", "--show-prefix") == ""
            commit = (git(source, "rev-parse", "HEAD") or "") if is_clean else ""
        elif Path(source).is_file():
            unpack(draft, source)
            unwrap(draft)
        elif commit := git(TREE, "rev-parse", "--verify", "--quiet", f"{source}^{{commit}}") or "":
            with tempfile.NamedTemporaryFile() as packed:
                if git(TREE, "archive", f"--output={packed.name}", commit) is None:
                    raise Failed(f"git cannot archive {commit}")
                unpack(draft, packed.name)
        else:
            raise Failed(f"{source} is no folder with a wsgi.py, no .tar.gz and no git ref")
        refuse_links_out(draft)
        if not (draft / "wsgi.py").is_file():
            raise Failed(f"{source} has no wsgi.py")
        digest, built = content(draft), datetime.now(UTC)
        version = re.search(r'^VERSION = "(.+)"', (draft / "settings.py").read_text(), re.MULTILINE)
        facts = {
            "version": version[1] if version else "unknown",
            "commit": (commit or digest)[:12],
            "built": built.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "by": by,
            "from": source,
            "diff": difference(old, draft) if old else [],
        }
        (draft / "release.json").write_text(json.dumps(facts, indent=1) + "\n")
        release = home / "releases" / f"{built:%Y%m%dT%H%M%S}-{digest[:12]}"
        draft.rename(release)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise Failed(f"{source} cannot be copied: {error}") from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return release


def stays(name: str) -> bool:
    return name in NOT_DEPLOYED or name.startswith(".")


def unpack(folder: Path, archive: str) -> None:
    """Unpack an archive. Raises Failed."""
    # tarfile's filters came with Python 3.11.4, and Debian 12 has 3.11.2. tar itself refuses names that lead out.
    options = ["--no-same-owner", "--no-same-permissions", "--force-local"]
    done = subprocess.run(["tar", "-x", *options, "-f", archive, "-C", folder], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failed(f"{archive} cannot be unpacked: {done.stderr.strip()[-2000:]}")


def refuse_links_out(folder: Path) -> None:
    """Raise Failed if a link leads out of a release."""
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise Failed(f"{path.relative_to(folder)} is a link that leads out: {os.readlink(path)}")


def unwrap(folder: Path) -> None:
    """Move what is in an archive's only folder one up."""
    inside = list(folder.iterdir())
    if len(inside) == 1 and inside[0].is_dir() and not inside[0].is_symlink():
        wrapper = inside[0].rename(folder.with_suffix(".wrapper"))
        folder.rmdir()
        wrapper.rename(folder)


def git(folder: str | Path, *words: str) -> str | None:
    """Return what git says; None without git, or outside of a repository."""
    own = f"safe.directory={Path(folder).resolve()}"  # as another user's it would be refused
    with suppress(OSError):
        said = subprocess.run(["git", "-c", own, "-C", str(folder), *words], capture_output=True, text=True)
        return said.stdout.strip() if said.returncode == 0 else None
    return None


def files(folder: Path) -> list[Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(map(stays, path.parts)))


def content(folder: Path) -> str:
    """Return a hash of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in files(folder):
        digest.update(f"{path}\0{hashlib.sha256((folder / path).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def difference(old: Path, new: Path) -> list[str]:
    """Return a line for each file that differs, with the lines that came and went."""
    lines = []
    for path in sorted({*files(old), *files(new)}):
        before, after = (
            (folder / path).read_text(errors="replace").splitlines() if (folder / path).is_file() else []
            for folder in (old, new)
        )
        if before != after:
            changes = [line[0] for line in difflib.unified_diff(before, after, n=0) if line[:3] not in ("+++", "---")]
            lines.append(f"{path} +{changes.count('+')} -{changes.count('-')}")
    return lines


def environment(home: Path, release: Path) -> str:
    """Link a release to the virtual environment of its requirements, made now if there is none. Raises Failed."""
    pins = (release / "requirements.txt").read_bytes()
    name = f"{hashlib.sha256(pins).hexdigest()[:12]}-{sys.version_info.major}.{sys.version_info.minor}"
    folder, complete = home / "environments" / name, home / "environments" / name / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        # As a developer's .venv is made, so that what builds a package comes with a hash, too.
        tools = pins_of([release / "requirements-dev.txt"], "setuptools", "uv")
        environ = {"UV_CACHE_DIR": str(home / "cache"), "UV_COMPILE_BYTECODE": "1", **os.environ}
        print("          installing the requirements, which are others", flush=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(tools))
            file.flush()
            command = [sys.executable, "dev/install.py", str(folder), file.name, "requirements.txt"]
            try:
                subprocess.run(
                    command,
                    cwd=release,
                    env=environ,
                    stderr=subprocess.PIPE,
                    text=True,
                    check=True,
                    timeout=INSTALL_SECONDS,
                )
            except subprocess.SubprocessError as error:
                shutil.rmtree(folder, ignore_errors=True)
                why = (getattr(error, "stderr", None) or str(error)).strip()[-2000:]
                raise Failed(f"the requirements cannot be installed: {why}") from None
        complete.touch()
    (release / "environment").symlink_to(f"../../environments/{name}")
    return name


def check(home: Path, release: Path, *options: str) -> None:
    """Let check.py look at a release apart. Raises Failed."""
    run_in(home, release, str(Path(__file__).with_name("check.py")), "--seconds", str(CHECK_SECONDS), *options)


def beside(old: Path | None) -> list[str]:
    """Return the option of check.py for the release that the new one must be safe beside."""
    return ["--old", str(old)] if old else []


def run_in(home: Path, release: Path, *words: str) -> None:
    """Run Python in a release, with its settings; those of the file, also if a shell has others. Raises Failed."""
    command = [str(release / "environment" / "bin" / "python"), *words]
    in_file = read_env(home / ".env")
    environ = {name: value for name, value in os.environ.items() if name not in in_file}
    environ["ENV_FILE"] = str(home / ".env")
    try:
        if subprocess.run(command, cwd=release, env=environ, timeout=MIGRATION_SECONDS).returncode:
            raise Failed(f"{Path(words[words[0] == '-m']).name} failed; see above")
    except subprocess.TimeoutExpired:
        raise Failed(f"no end within {MIGRATION_SECONDS} s") from None


def ask(home: Path, say: Any, **words: Any) -> dict[str, Any] | None:
    """Ask the supervisor, and say its steps.

    :returns: how it ended; None if it is not running.
    """
    with socket.socket(socket.AF_UNIX) as control:
        try:
            control.connect(str(home / "control.sock"))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        answer: dict[str, Any] = {}
        try:
            control.sendall(f"{json.dumps(words)}\n".encode())
            for line in control.makefile():
                answer = json.loads(line)
                if "step" in answer:
                    say(answer["step"])
        except KeyboardInterrupt:
            raise Interrupted from None
        if "end" not in answer:
            raise Failed("the supervisor has ended; see its log")
        return answer


def state(home: Path) -> State:
    known = State(home / "state.json")
    known.load()
    return known


def about(release: Path) -> dict[str, Any]:
    with suppress(OSError):
        return dict(json.loads((release / "release.json").read_text()))
    return {}


def described(release: Path) -> str:
    facts = about(release)
    return f"{facts.get('version')}+{facts.get('commit')}, {len(facts.get('diff', []))} files differ"


def named(home: Path, release: str) -> str:
    facts = about(home / "releases" / release) if release else {}
    return f"{release} ({facts.get('version')}+{facts.get('commit')})" if release else "nothing"


def prune(home: Path) -> None:
    """Remove releases that no rollback leads to, and environments that no release uses."""
    known, folder = state(home), home / "releases"
    kept = {known.current, known.provisional, *known.previous}
    for release in folder.iterdir():
        if release.name not in kept:
            remove(release)
    used = {os.readlink(link).rpartition("/")[2] for link in folder.glob("*/environment") if link.is_symlink()}
    for environment in (home / "environments").iterdir():
        if environment.name not in used:
            remove(environment)


def remove(release: Path) -> None:
    shutil.rmtree(release, ignore_errors=True)


if __name__ == "__main__":
    main()
