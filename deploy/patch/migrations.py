"""The revisions of a release, read and not run: are they one chain, safe beside other code, and quick?"""

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from deploy.patch.programs import Refused

FOLDER = "storage/migrations/versions"
DESTRUCTIVE = {"drop_table", "drop_column", "drop_constraint", "drop_index", "delete"}
DESTRUCTIVE |= {"alter_column", "rename_table", "batch_alter_table"}
CONSTRAINTS = {"create_unique_constraint", "create_check_constraint", "create_foreign_key", "create_primary_key"}
STATEMENT = r"(?is)(?:^|;)(?:\s|(?:--|#)[^\n]*\n|/\*.*?\*/)*+"
"""Where a statement of SQL begins: after spaces and comments."""
DESTRUCTIVE_SQL = re.compile(
    STATEMENT + r"(DROP|ALTER|RENAME|TRUNCATE|DELETE|REPLACE|CREATE\s+UNIQUE|CREATE\s+OR\s+REPLACE)\s"
)
INDEX_SQL = re.compile(
    STATEMENT + r"CREATE\s+(?:UNIQUE\s+|FULLTEXT\s+|SPATIAL\s+)?INDEX\s+(?!\s*IF\s)(?:.*?\bON\s+[`\"]?(\w+))?"
)
SLOW_SQL = re.compile(STATEMENT + r"(OPTIMIZE|LOCK|ALTER(?=\s+(?:\w+\s+)?TABLE\s)(?!.*\bALGORITHM\s*=?\s*INSTANT\b))\s")
UPDATE_SQL = re.compile(STATEMENT + r"UPDATE\s(?!.*\bWHERE\b)")
MAY_COPY = "MariaDB may copy the table, and writes wait: {}, or write SQL with ALGORITHM=INSTANT, so that it cannot"
BUILD_BEFORE = "build it before, node by node (deploy/galera/README.md, Migrations), and say if_not_exists=True here"
ALL_ROWS = "UPDATE without WHERE locks all rows: change some at a time, and commit"
FIRST_RELEASE = "0007"
"""The last revision of 0.1.0, before which no table had rows."""
VERSION = re.compile(r"\d+(\.\d+)*")
BY_KEYWORD = 99
"""The place of an argument that has none."""


class Revision(NamedTuple):
    """A migration, as its file says."""

    path: Path
    tree: ast.Module
    revision: Any
    down_revision: str | None
    old_code_left_in: str | None

    def where(self, line: int = 1) -> str:
        return f"{FOLDER}/{self.path.name}:{line}"


def check_migrations(release: Path, old: Path | None) -> tuple[str, bool]:
    """Check the revisions of a release by the rule in the docstring of storage/migrations/env.py.

    :param old: the release that serves now. It may have more revisions: then this is a way back.
    :returns: what to print, and whether the revisions of the two differ.
    :raises Refused: at the first one that breaks the rule.
    """
    new, version = read_revisions(release), read_version(release)
    before, old_version = (read_revisions(old), read_version(old)) if old else ({}, None)
    for number in sorted(new.keys() & before.keys()):
        if _meaning(new[number].tree) != _meaning(before[number].tree):
            raise Refused(
                f"{new[number].where()}: not the same in {old}, where it has run already: add a revision instead"
            )
    added, gone = sorted(new.keys() - before.keys()), sorted(before.keys() - new.keys())
    for number in added:
        require_safe(new[number], version, old_version)
        if number > FIRST_RELEASE:
            require_quick(new[number])
    for number in gone:  # the database keeps its schema, and this older code is to serve it
        require_safe(before[number], str(old_version), version)
    if old is None:
        return f"{min(new)} to {max(new)}", False
    changes = [f"+{number}" for number in added] + [f"-{number}" for number in gone]
    return f"{min(new)} to {max(new)}, {', '.join(changes) or 'none of them new'}", bool(changes)


def read_version(release: Path) -> str:
    """Return VERSION as settings.py has it.

    :raises Refused: if there is none.
    """
    with suppress(OSError, SyntaxError, ValueError):
        version = _constants(ast.parse((release / "settings.py").read_bytes())).get("VERSION")
        if VERSION.fullmatch(str(version)):
            return str(version)
    raise Refused(f'{release}/settings.py: no line such as VERSION = "0.1.0"')


def read_revisions(release: Path) -> dict[str, Revision]:
    """Read the revisions by number.

    :raises Refused: if they are not one chain.
    """
    chain: dict[str, Revision] = {}
    for path in sorted((release / FOLDER).glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise Refused(f"{path}: {error}") from None
        found: dict[str, Any] = _constants(tree)
        names, last = ("revision", "down_revision", "OLD_CODE_LEFT_IN"), max(chain, default=None)
        revision = Revision(path, tree, *[found.get(name) for name in names])
        if not re.match(r"\d{4}_", path.name) or revision.revision != path.name[:4]:
            raise Refused(
                f"{revision.where()}: the revision {revision.revision!r} is not what its name begins with, NNNN_"
            )
        if revision.revision in chain:
            raise Refused(f"{revision.where()}: {chain[revision.revision].path.name} has the same number")
        if revision.down_revision != last or "down_revision" not in found:
            raise Refused(f"{revision.where()}: down_revision must be {last!r}, the one before it")
        chain[revision.revision] = revision
    if not chain:
        raise Refused(f"{FOLDER}: no revisions")
    return chain


def require_safe(revision: Revision, version: str, other: str | None) -> None:
    """Check that code which does not know a revision can go on beside its schema.

    :param version: of the release that has the revision.
    :param other: of the release that lacks it; None if that is unknown.
    :raises Refused: if it cannot, unless the revision says that the code in question has left, and it has.
    """
    left_in = revision.old_code_left_in
    for line, reason in sorted(find_hazards(revision.tree)):
        what = f"{revision.where(line)}: {reason}"
        if left_in is None:
            raise Refused(f'{what}. Say OLD_CODE_LEFT_IN = "…" if code that minds has left in an earlier release')
        if not VERSION.fullmatch(str(left_in)):
            raise Refused(f"{what}. OLD_CODE_LEFT_IN = {left_in!r} is no version such as 0.1.0")
        if _numbers(left_in) >= _numbers(version):
            raise Refused(f"{what}. OLD_CODE_LEFT_IN = {left_in!r} is not earlier than this release, {version}")
        if other and _numbers(left_in) > _numbers(other):
            raise Refused(f"{what}. The code that minds has left in {left_in}, and is in {other}")


def require_quick(revision: Revision) -> None:
    """Check that a revision keeps nobody waiting: while a table is copied, or Galera builds an index, writes do.

    :raises Refused: if it may do so with a table that exists; no OLD_CODE_LEFT_IN changes that.
    """
    for line, reason in sorted(find_slow(revision.tree)):
        raise Refused(f"{revision.where(line)}: {reason}")


def find_hazards(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find what loses data, or breaks writes of code that does not know this revision: line and reason.

    It finds mistakes, not malice: what is put together at run time it does not see.
    """
    nodes = _upgrade(tree)
    made, left_null = _tables_made(nodes), _columns_left_null(nodes)
    for node in nodes:
        match node:
            case ast.Attribute(attr=name) | ast.alias(name=name) if name in DESTRUCTIVE:
                yield node.lineno, f"{name} takes away what older code may use"
            case ast.Constant(value=str(text)) if found := DESTRUCTIVE_SQL.search(text):
                yield node.lineno, f"{found[1].upper()} in SQL may take away what older code uses"
            case ast.Call():
                yield from ((node.lineno, reason) for reason in _hazards_of_call(node, nodes, made, left_null))


def find_slow(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find what builds an index on a table that exists, or may copy it: line and reason."""
    nodes = _upgrade(tree)
    made = _tables_made(nodes)
    for node in nodes:
        match node:
            case ast.Constant(value=str(text)) if (found := INDEX_SQL.search(text)) and found[1] not in made:
                yield node.lineno, f"CREATE INDEX on a table that exists: {BUILD_BEFORE}"
            case ast.Constant(value=str(text)) if found := SLOW_SQL.search(text):
                yield node.lineno, f"{found[1].upper()} in SQL: {MAY_COPY.format('use op')}"
            case ast.Constant(value=str(text)) if UPDATE_SQL.search(_without_parentheses(text)):
                yield node.lineno, ALL_ROWS
            case ast.Call():
                yield from ((node.lineno, reason) for reason in _slow_of_call(node, nodes, made))


def _upgrade(tree: ast.Module) -> list[ast.AST]:
    """Return what a revision does, without its way back and what is only said."""
    nodes = [node for part in tree.body if getattr(part, "name", "") != "downgrade" for node in ast.walk(part)]
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return [node for node in nodes if node not in docstrings]


def _hazards_of_call(
    call: ast.Call, nodes: Sequence[ast.AST], made: Sequence[Any], left_null: Sequence[tuple[Any, Any]]
) -> Iterator[str]:
    name = _called(call)
    if name in CONSTRAINTS and _argument(call, 1, "table_name", "source_table") not in made:
        yield f"{name} on a table that exists: what older code writes may violate it"
    elif name in ("ForeignKey", "ForeignKeyConstraint"):
        target = str(_argument(call, 0, "column") if name == "ForeignKey" else _argument(call, 1, "refcolumns"))
        is_new = target.strip("[']").partition(".")[0] in made
        if not is_new and _argument(call, BY_KEYWORD, "ondelete") not in ("CASCADE", "SET NULL"):
            yield f"{name} without ondelete CASCADE or SET NULL: older code could not delete what it refers to"
    elif name == "create_index" and _argument(call, BY_KEYWORD, "unique"):
        table, columns = _argument(call, 1, "table_name"), _argument(call, 2, "columns")
        if table not in made and not any((table, column) in left_null for column in columns or ()):
            yield "a unique index on a table that exists: what older code writes may violate it"
    elif name == "add_column":
        column = _column(call, nodes)
        if column is None:
            yield "add_column whose sa.Column(…) is not written out, so it cannot be checked"
        elif _is_required(column):
            yield "a column that is NOT NULL and has no server_default: older code does not fill it"


def _slow_of_call(call: ast.Call, nodes: Sequence[ast.AST], made: Sequence[Any]) -> Iterator[str]:
    name = _called(call)
    if name == "create_index":
        if _argument(call, 1, "table_name") not in made and not _argument(call, BY_KEYWORD, "if_not_exists"):
            yield f"create_index on a table that exists: {BUILD_BEFORE}"
    elif name in CONSTRAINTS and _argument(call, 1, "table_name", "source_table") not in made:
        yield f"{name} on a table that exists: {MAY_COPY.format('use a unique index')}"
    elif name == "execute":
        for chain in map(_chain, _given(call, nodes)):
            if "update" in chain and "where" not in chain:
                yield ALL_ROWS
    elif name == "alter_column" and _argument(call, BY_KEYWORD, "type_", "nullable", "new_column_name") is not None:
        yield f"alter_column: {MAY_COPY.format('add a column')}"
    elif name == "add_column" and _argument(call, 0, "table_name") not in made and (column := _column(call, nodes)):
        for option in ("index", "unique"):
            if _argument(column, BY_KEYWORD, option):
                later = "leave it out, and use create_index in a later release"
                yield f"{option}=True on a table that exists: {later}: {BUILD_BEFORE}"
        for part in ast.walk(column):
            if isinstance(part, ast.Call) and (
                _called(part) == "ForeignKey" or (_called(part) == "Computed" and _argument(part, 1, "persisted"))
            ):
                yield f"{_called(part)} on a table that exists: {MAY_COPY.format('leave it out')}"


def _column(add_column: ast.Call, nodes: Sequence[ast.AST]) -> ast.Call | None:
    given = _given(add_column, nodes)
    return next((word for word in given if isinstance(word, ast.Call) and _called(word) == "Column"), None)


def _given(call: ast.Call, nodes: Sequence[ast.AST]) -> list[ast.expr]:
    """Return the arguments of a call, and what was assigned to those that are variables."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    names = {word.id for word in given if isinstance(word, ast.Name)}
    return given + [node.value for node in nodes if isinstance(node, ast.Assign) and names & _targets(node)]


def _chain(expression: ast.AST | None) -> list[str]:
    """Return what is called one after the other: values and update of `orders.update().values(…)`."""
    if not isinstance(expression, ast.Call):
        return []
    return [_called(expression), *_chain(getattr(expression.func, "value", None))]


def _without_parentheses(sql: str) -> str:
    """Leave out what is in parentheses, as a subquery that has a WHERE of its own."""
    while (outer := re.sub(r"\([^()]*\)", "", sql)) != sql:
        sql = outer
    return sql


def _has_default(column: ast.Call) -> bool:
    return _argument(column, BY_KEYWORD, "server_default") is not None


def _is_required(column: ast.Call) -> bool:
    nullable = _argument(column, BY_KEYWORD, "nullable")
    if nullable is None:
        nullable = not _argument(column, BY_KEYWORD, "primary_key")
    return nullable is not True and not _has_default(column)


def _columns_left_null(nodes: Sequence[ast.AST]) -> list[tuple[Any, Any]]:
    """Return the added columns, by table and name, that older code leaves NULL, which no unique index minds."""
    calls = [node for node in nodes if isinstance(node, ast.Call) and _called(node) == "add_column"]
    return [
        (_argument(call, 0, "table_name"), _argument(column, 0, "name"))
        for call in calls
        if (column := _column(call, nodes)) and not (_is_required(column) or _has_default(column))
    ]


def _tables_made(nodes: Sequence[ast.AST]) -> list[Any]:
    """Return the tables that a revision creates, also by a name of its own for op.create_table."""
    creators = {"create_table"}
    for node in nodes:
        if isinstance(node, ast.Assign) and "create_table" in ast.dump(node.value):
            creators |= _targets(node)
    calls = [node for node in nodes if isinstance(node, ast.Call) and _called(node) in creators]
    return [_argument(call, 0, "table_name") for call in calls]


def _targets(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


def _called(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def _argument(call: ast.Call, place: int, *names: str) -> Any:
    """Return the literal value of an argument; None if it is not given, and its code if it is no literal."""
    given = [keyword.value for keyword in call.keywords if keyword.arg in names] or call.args[place : place + 1]
    try:
        return ast.literal_eval(given[0]) if given else None
    except ValueError:
        return ast.unparse(given[0])


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Return the constants that a module assigns to its names."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({target.id: node.value.value for target in targets if isinstance(target, ast.Name)})
    return found


def _meaning(tree: ast.Module) -> str:
    """Return what a module does: without its docstring, comments and layout."""
    return ast.dump(ast.Module(tree.body[ast.get_docstring(tree) is not None :], []))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.sub(r"(\.0+)*$", "", version).split(".")]
