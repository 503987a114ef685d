"""`make resource NAME=coupons [ONE=coupon] [ZH=优惠券]`: schema, routes, model, migration, tests, client types.

It works on a copy of this tree, and brings what is new in it back when all of it has succeeded: all or nothing.
"""

import ast
import builtins
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from string import Template
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).parent
NOT_COPIED = (".git", ".venv", "var", "dist", "node_modules", "__pycache__", ".*_cache", ".hypothesis", ".schemathesis")
MAXIMUM_LENGTH = 25
"""Of each name, so that the lines of the templates stay short."""

METHODS = {"get": "GET", "update": "PUT", "delete": "DELETE"}
CLIENT = "clients/miniprogram"
SINGULARS = {"ies": "y", "sses": "ss", "shes": "sh", "ches": "ch", "xes": "x", "s": ""}


class Refused(Exception):
    """Why no resource is written; nothing has changed."""


class Edit(NamedTuple):
    """A line for the new resource in a file that exists."""

    file: str
    before: str
    """A pattern, whose first match is what the line follows."""
    line: str


EDITS = (
    Edit("blueprints/__init__.py", r"^from blueprints import \(?", "$many, "),
    Edit(
        "blueprints/__init__.py",
        r"^    mount\(orders\..*\n",
        '    mount($many.blueprint, url_prefix=f"{V1}/$path", auth=policies.signed_in)\n',
    ),
    Edit("blueprints/personal_data.py", r"(?=^from blueprints)", "from blueprints.$many import ${Model}Schema\n"),
    Edit(
        "blueprints/personal_data.py",
        r"^class ExportSchema\(Schema\):\n(    .*\n|\n(?=    ))+",
        "    $many = fields.List(fields.Nested(${Model}Schema), required=True)\n",
    ),
    Edit("storage/models.py", r"\n\Z", (TEMPLATES / "model.txt").read_text()),
    Edit("storage/ownership.py", r"^from storage\.models import \(?", "$Model, "),
    Edit("storage/ownership.py", r"^    Owned\(Order, .*\n", '    Owned($Model, export="$many"),\n'),
    Edit(
        "tests/blueprints/callers.py",
        r"^from blueprints import auth\n",
        "from blueprints.$many import ${Model}Schema\n",
    ),
    Edit("tests/blueprints/callers.py", r"^ORDER = .*\n", "$CONSTANT = examples(${Model}Schema)\n"),
    Edit(
        "tests/blueprints/callers.py",
        r"^def ids_of\((.*\n)+?    return \{\n(        .*\n)+",
        '        "${one}_id": caller.create("/$path", $CONSTANT)["id"],\n',
    ),
    Edit(
        "tests/blueprints/callers.py",
        r"^def bodies\((.*\n)+?    return \{\n(        .*\n)+",
        """        "POST /api/v1/$path": $CONSTANT,
        "PUT /api/v1/$path/{${one}_id}": {"remark": "每人两份"},
        "DELETE /api/v1/$path/{${one}_id}": None,
""",
    ),
    Edit("tests/blueprints/test_lists.py", r"(?=^from blueprints)", "from blueprints.$many import ${Model}Schema\n"),
    Edit("tests/blueprints/test_lists.py", r"^from storage\.models import \(?", "$Model, "),
    Edit("tests/blueprints/test_lists.py", r"^from tests\.blueprints\.callers import \(?", "$CONSTANT, "),
    Edit(
        "tests/blueprints/test_lists.py",
        r"^LISTS = \{\n(    .*\n)+",
        '    "/$path": Listed($Model, ${Model}Schema().load($CONSTANT), {"user_id": "{id}"}),\n',
    ),
    Edit("clients/miniprogram/kuaishang.js", r"^\$\{resource\('Order', .*\n", "$operations\n"),
    Edit("docs/zh/house.md", r"^  orders\.py .*\n", "  $file用户的$zh\n"),
    Edit("docs/en/house.md", r"^  orders\.py .*\n", "  ${file}the $words of a user\n"),
    Edit("CHANGELOG.md", r"^## .*\n(?s:.*?)\S\n(?=\n*(## |\Z))", "- `/api/v1/$path`: the $words of a user.\n"),
)
"""Where each file that exists gets its lines; ruff puts imports in order afterwards."""
FILES = {"blueprints/$many.py": "blueprint.txt", "tests/blueprints/test_$many.py": "test.txt"}
"""Each new file, and its template."""


def main() -> None:
    try:
        names = make_names(os.environ.get("NAME", ""), os.environ.get("ONE", ""), os.environ.get("ZH", ""))
        with tempfile.TemporaryDirectory(prefix="resource-") as folder:
            copy = Path(folder) / "tree"
            shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
            before = read_files(copy)
            refuse_taken(names, copy)
            write(names, copy)
            changed = {path: text for path, text in read_files(copy).items() if before.get(path) != text}
        bring_back(before, changed)
    except Refused as error:
        sys.exit(f"{error}\nNothing has been changed.")
    for path in sorted(changed):
        print("changed" if path in before else "new    ", path)
    if not has_node():
        print("Without node the client's types are as before: run `make client` where there is node 18.")


def make_names(many: str, one: str, chinese: str) -> dict[str, str]:
    """Return what templates may contain, by its name.

    :param many: a plural noun in snake_case: the table, the module, and with dashes the path.
    :param one: the singular; if empty it is formed by the usual rules.
    :param chinese: for the Chinese texts; if empty the English noun.
    :raises Refused: if something cannot be a name.
    """
    if not many:
        raise Refused("Say what the resource is called: make resource NAME=coupons")
    for name in (many, one or many):
        if not re.fullmatch("[a-z]+(_[a-z]+)*", name) or len(name) > MAXIMUM_LENGTH:
            raise Refused(f"{name!r} is no name such as gift_cards: at most {MAXIMUM_LENGTH} of a to z and _.")
    if not one:
        ending = next((ending for ending in SINGULARS if many.endswith(ending)), None)
        if ending is None or many.endswith("ss"):
            raise Refused(f"{many} is not in the plural. If it is, say the singular too: ONE=…")
        one = many.removesuffix(ending) + SINGULARS[ending]
    if one in ("", many):
        raise Refused("NAME is the plural and ONE the singular: they must differ.")
    if not re.fullmatch(r"[\w ]*", chinese) or len(chinese) > MAXIMUM_LENGTH:
        raise Refused(f"{chinese!r} is no name in Chinese, such as 优惠券.")
    model, words, word = one.title().replace("_", ""), many.replace("_", " "), one.replace("_", " ")
    for name in (many, one, model):
        if keyword.iskeyword(name) or hasattr(builtins, name):
            raise Refused(f"{name} means something in Python: choose another noun.")
    path, plural = many.replace("_", "-"), many.title().replace("_", "")
    one_path = f"/{path}/{{{one}_id}}"
    operations = [f"{verb}{model} {method} {one_path}" for verb, method in METHODS.items()]
    operations = [f"list{plural} GET /{path}", f"create{model} POST /{path}", *operations]
    a_word = f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
    return {
        "many": many,
        "one": one,
        "path": path,
        "operations": f"${{resource('{model}', '{one_path}')}}" if plural == f"{model}s" else "\n".join(operations),
        "file": f"{many}.py ".ljust(20),
        "Model": model,
        "CONSTANT": one.upper(),
        "words": words,
        "Words": words.capitalize(),
        "a_word": a_word,
        "A_word": a_word.capitalize(),
        "zh": chinese or f" {words}",
        "ZH": chinese or f"{words} 资源",
    }


def refuse_taken(names: dict[str, str], tree: Path) -> None:
    """Refuse names that something in the tree has already.

    :raises Refused: naming what has it.
    """
    model, one_id = names["Model"], f"{names['one']}_id"
    wanted = {names["many"], names["one"], model, names["CONSTANT"]}
    wanted |= {f"{model}{kind}" for kind in ("Schema", "ChangeSchema", "ListSchema")}
    defined = {}
    for file, template in FILES.items():
        if (tree / fill(file, names)).exists():
            raise Refused(f"There is {fill(file, names)} already.")
        text = fill((TEMPLATES / template).read_text(), make_names("placeholders", "", ""))
        defined[f"dev/resource/{template}"] = names_defined(text)
    defined |= {edit.file: names_defined((tree / edit.file).read_text()) for edit in EDITS if edit.file.endswith(".py")}
    for file, theirs in defined.items():
        if clash := sorted(wanted & theirs):
            raise Refused(f"{clash[0]} means something in {file} already: choose another noun.")
    document = json.loads((tree / "openapi.json").read_text())
    schemas = document["components"]["schemas"].keys() & {f"{model}{end}" for end in ("", "Envelope", "Page", "Change")}
    paths = [path for path in document["paths"] if f"/{names['path']}" in path or f"{{{one_id}}}" in path]
    if paths or schemas:
        raise Refused(f"openapi.json has {[*paths, *sorted(schemas)][0]} already: choose another noun.")


def names_defined(source: str) -> set[str]:
    """Return the names that a module imports, assigns or defines at its top level, and the tables of its models."""
    tree = ast.parse(source)
    names = set(re.findall(r'__tablename__ = "(\w+)"', source))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def fill(text: str, names: dict[str, str]) -> str:
    return Template(text).substitute(names)


def write(names: dict[str, str], tree: Path) -> None:
    """Write the resource into a tree.

    :raises Refused: if the tree lacks a place for a line, or a step fails.
    """
    python, client = [sys.executable, "-m"], tree / CLIENT
    environ = {**os.environ, "ENV_FILE": os.devnull, "NAME": names["many"]}
    environ |= {"PYTHONDONTWRITEBYTECODE": "1", "RUFF_NO_CACHE": "true"}
    for file, template in FILES.items():
        (tree / fill(file, names)).write_text(fill((TEMPLATES / template).read_text(), names))
    for edit in EDITS:
        insert(edit, names, tree)
    touched = [fill(file, names) for file in {*FILES, *(edit.file for edit in EDITS)} if file.endswith(".py")]
    commands = [
        [*python, "dev.migration"],
        [*python, "ruff", "check", "--fix", "--exit-zero", *touched],  # the order of imports
        [*python, "ruff", "format", *touched],
        [*python, "ruff", "check", *touched],
        [*python, "dev.openapi"],
    ]
    if has_node():
        commands += [["node", str(ROOT / CLIENT / "types.mjs"), "openapi.json", f"{CLIENT}/kuaishang.d.ts"]]
    for command in commands:
        done = subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    for name in ("kuaishang.js", "kuaishang.d.ts"):
        shutil.copy(client / name, client / "sample")


def has_node() -> bool:
    """Whether the client's types can be written."""
    return shutil.which("node") is not None and (ROOT / CLIENT / "node_modules").is_dir()


def insert(edit: Edit, names: dict[str, str], tree: Path) -> None:
    path = tree / edit.file
    text = path.read_text()
    place = re.search(edit.before, text, re.MULTILINE)
    if not place:
        line = fill(edit.line, names).strip()
        raise Refused(f"{edit.file} has no place for this: {line}\nNothing in it matches {edit.before}")
    path.write_text(text[: place.end()] + fill(edit.line, names) + text[place.end() :])


def read_files(tree: Path) -> dict[str, bytes]:
    files = (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


def bring_back(before: dict[str, bytes], changed: dict[str, bytes]) -> None:
    """Write files into this tree: all of them or, if that fails, none.

    :raises Refused: if one of them is not what it was before.
    """
    for path in changed:
        if before.get(path) != ((ROOT / path).read_bytes() if (ROOT / path).exists() else None):
            raise Refused(f"{path} has been changed meanwhile: do it again.")
    try:
        for path, text in changed.items():
            (ROOT / path).write_bytes(text)
    except BaseException:
        for path in changed:
            if path in before:
                (ROOT / path).write_bytes(before[path])
            else:
                (ROOT / path).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    main()
