"""Which part may import which: only those below it, and never the stand-ins for development."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import blueprints

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "settings": set(),
    "errors": set(),
    "proxies": set(),
    "overload": {"errors", "telemetry"},
    "concurrency": {"errors", "overload", "telemetry"},
    "telemetry": set(),
    "storage": {
        "concurrency",
        "errors",
        "settings",
        "telemetry",
    },  # settings for the migrations, which run by themselves
    "wechat": {"concurrency", "errors", "telemetry"},
    "blueprints": {"concurrency", "errors", "proxies", "storage", "telemetry", "wechat"},
    "service": {"blueprints", "concurrency", "errors", "proxies", "settings", "storage", "telemetry", "wechat"},
    "wsgi": {"service"},
}
PARTS = {*MAY_IMPORT, "bench", "dev", "tests"}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def imported_parts(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)} & PARTS


def files_of(part: str) -> list[Path]:
    return [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_parts_below_it(part: str) -> None:
    assert files_of(part)
    for path in files_of(part):
        assert imported_parts(path) - {part} <= MAY_IMPORT[part], path


def test_every_part_of_the_service_is_named_here() -> None:
    top = {path.stem for path in ROOT.glob("*.py") if path.name != "gunicorn.conf.py"}
    assert top | {path.parent.name for path in ROOT.glob("*/__init__.py")} == PARTS


def test_the_simulator_does_not_import_the_service() -> None:
    files = sorted((ROOT / "dev" / "wechat_simulator").rglob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imported_modules(path) if name.partition(".")[0] in PARTS}
        assert all(name.startswith("dev.wechat_simulator") for name in ours), path


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_there_is_no_import_cycle() -> None:
    """Imports inside functions and under TYPE_CHECKING count too."""
    files = {module_name(path): path for part in MAY_IMPORT for path in files_of(part)}
    imports: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                below = {f"{node.module}.{alias.name}" for alias in node.names}  # may be modules, or names in this one
                imports[name] |= below & files.keys()
                imports[name] |= set() if below <= files.keys() else {str(node.module)}
    assert {"storage.models", "errors"} <= imports["storage.identities"]
    assert "telemetry.span_export" in imports["telemetry.traces"]
    TopologicalSorter({name: targets & files.keys() for name, targets in imports.items()}).prepare()


def names_on_g(path: Path) -> set[str]:
    """The names that a module reads or writes on `flask.g`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(ast.Name("g"), name) if name not in ("get", "pop", "setdefault"):
                names.add(name)
            case ast.Call(ast.Attribute(ast.Name("g")), [ast.Constant(name), *_]):
                names.add(name)
            case ast.Call(ast.Name("getattr" | "hasattr" | "setattr"), [ast.Name("g"), ast.Constant(name), *_]):
                names.add(name)
            case ast.Compare(ast.Constant(name), [ast.In() | ast.NotIn()], [ast.Name("g")]):
                names.add(name)
    return names


def test_the_docstring_of_blueprints_lists_every_name_on_g() -> None:
    listed = re.findall(r"`(\w+)`", (blueprints.__doc__ or "").partition("`flask.g` holds")[2])
    used = {name for part in MAY_IMPORT for path in files_of(part) for name in names_on_g(path)}
    assert sorted(listed) == sorted(used)
