"""The files that the service is made of: which of them have changed, and what they import."""

import ast
import importlib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MIGRATIONS = ROOT / "storage/migrations"
NOT_SERVED = {"bench", "deploy", "dev", "tests"}
SUFFIXES = {".py", ".html"}


class Source(NamedTuple):
    """A file as it was read."""

    stamp: tuple[int, int, int]
    text: bytes


Sources = dict[Path, Source]


def paths() -> Iterator[Path]:
    """Find the files that the service is made of."""
    yield from ROOT.glob("*.py")
    for package in ROOT.glob("*/__init__.py"):
        if package.parent.name not in NOT_SERVED:
            yield from (path for path in package.parent.rglob("*") if path.suffix in SUFFIXES)


def look(known: Sources) -> Sources:
    """Return all files; those are read that have changed."""
    found = {}
    for path in paths():
        with suppress(OSError):  # an editor's lock, or a file that is being replaced
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            same = path in known and known[path].stamp == stamp
            found[path] = known[path] if same else Source(stamp, path.read_bytes())
    return found


def changes(old: Sources, new: Sources) -> set[Path]:
    """Return the files that have come or gone, or mean something else."""
    return {path for path in old.keys() | new.keys() if not means_the_same(path, old.get(path), new.get(path))}


def means_the_same(path: Path, old: Source | None, new: Source | None) -> bool:
    if old is None or new is None or old.text == new.text or path.suffix != ".py":
        return old is new or (old is not None and new is not None and old.text == new.text)
    try:
        return ast.dump(ast.parse(old.text)) == ast.dump(ast.parse(new.text))
    except (SyntaxError, ValueError):
        return False


def import_libraries(sources: Sources) -> None:
    """Import what the code imports and is none of it."""
    own = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sources}
    for path, source in sources.items():
        for name in re.findall(r"^(?:from|import) ([\w.]+)", source.text.decode(errors="replace"), re.MULTILINE):
            if MIGRATIONS not in path.parents and name.partition(".")[0] not in own:
                with suppress(ImportError):  # the code that needs it says so
                    importlib.import_module(name)
