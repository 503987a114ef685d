"""`make compatible`: fail if openapi.json breaks clients of the last release, unless the changelog names the break.

Compares openapi.json with dev/openapi.released.json, which `make release` copies from it, and prints a line for each
breaking change: where, and what. What clients may send must not shrink, and what they get must not grow, except by new
fields: a tighter limit breaks a request, a looser one or a new code breaks a response. What generators make names of
stays: operation ids, first tags, parameters, schemas. What is deprecated has `x-sunset`, the day from which it may be
missing.

A change that is meant is named, as its line begins, in the section of settings.VERSION in CHANGELOG.md:

    - **Breaking** `POST /api/v1/orders request.remark`, `Order.remark`: at most 300 characters; shorten it first.

A name excuses what changed there and within it (`Order`, `POST /api/v1/orders`), and nothing else. The exit status is 1
if a breaking change is not named, or if openapi.en.json differs from openapi.json in more than its texts.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import accumulate, zip_longest
from math import inf
from pathlib import Path
from typing import Any, Literal

import settings

ROOT = Path(__file__).resolve().parent.parent
NOTICE = timedelta(days=30)
"""How long before its x-sunset clients learn of it, at least."""

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
TEXTS = {"description", "example", "examples", "externalDocs", "summary", "title"}
ANNOTATIONS = {*TEXTS, "$anchor", "$comment", "$defs", "$id", "$schema", "deprecated", "readOnly", "writeOnly", "xml"}
NAMED = {
    *("$defs", "callbacks", "content", "dependentSchemas", "encoding", "headers", "parameters", "paths"),
    *("patternProperties", "properties", "requestBodies", "responses", "schemas", "securitySchemes"),
}
"""Keys of these are names, which may be the same as keywords: a property may be called `title`."""

TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
UPPER_LIMITS = {"exclusiveMaximum", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum"}
LOWER_LIMITS = {"exclusiveMinimum", "minContains", "minItems", "minLength", "minProperties", "minimum", "uniqueItems"}
DEFAULTS = {"minContains": 1, "minItems": 0, "minLength": 0, "minProperties": 0, "uniqueItems": False}
SCHEMAS_WITHIN = {"additionalProperties": "{}", "items": "[]"} | {
    keyword: f" {keyword}"
    for keyword in (
        *("contains", "contentSchema", "else", "if", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties"),
    )
}
"""Keywords that contain one schema, and how a place names it."""

MAPS_OF_SCHEMAS = ("dependentSchemas", "patternProperties")
LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
COMPARED_APART = {"const", "default", "discriminator", "enum", "properties", "required", "type"}
COMPARED_APART |= {*SCHEMAS_WITHIN, *MAPS_OF_SCHEMAS, *LISTS_OF_SCHEMAS}

SCHEMAS = "#/components/schemas/"
ABSENT: Any = object()

Node = dict[str, Any]
Place = tuple[str, ...]
"""From the outside inwards; joined, it is what a marking names. `POST /api/v1/orders`, ` request`, `.remark`; within a
schema that has a name, `Order`, `.items`, `[]`."""

Side = Literal["request", "response"]
Effect = Literal["tighter", "looser"]
TIGHTER, LOOSER = frozenset[Effect]({"tighter"}), frozenset[Effect]({"looser"})
EITHER = TIGHTER | LOOSER
BREAKING: dict[Side, frozenset[Effect]] = {"request": TIGHTER, "response": LOOSER}


@dataclass(frozen=True)
class Change:
    """A breaking change; without an operation if it concerns the document as a whole."""

    place: Place
    what: str
    operation: str = ""
    side: str = ""


def main() -> int:
    released, document, english = (
        json.loads((ROOT / name).read_text())
        for name in ("dev/openapi.released.json", "openapi.json", "openapi.en.json")
    )
    changes = breaking_changes(released, document, datetime.now(UTC).date())
    names, malformed = markings((ROOT / "CHANGELOG.md").read_text(), settings.VERSION)
    unnamed = [change for change in changes if not is_named(change, names)]
    problems = [f"CHANGELOG.md: not as in dev/compatibility.py, with places and reason: {line}" for line in malformed]
    problems += [f"openapi.en.json is not as openapi.json: {place}" for place in differences(document, english)]
    problems += lines(unnamed)
    print("\n".join(problems) or f"compatible with the document of the last release, {released['info']['version']}")
    if unnamed:
        print(f"If clients have to bear it, name each in CHANGELOG.md under {settings.VERSION}: dev/compatibility.py.")
    return 1 if problems else 0


def lines(changes: Iterable[Change]) -> list[str]:
    """Return a line for each thing that changed. If that is in a schema, it says whom it breaks."""
    broken: dict[str, dict[str, None]] = {}
    for change in changes:
        users = broken.setdefault(f"{''.join(change.place)}: {change.what}", {})
        if change.operation not in ("", change.place[0]):
            users[f"{change.side} of {change.operation}"] = None
    return [line + _list(list(users)) for line, users in broken.items()]


def _list(users: list[str]) -> str:
    more = f" and {len(users) - 3} more" if users[3:] else ""
    return f" ({', '.join(users[:3])}{more})" if users else ""


def markings(changelog: str, version: str) -> tuple[set[str], list[str]]:
    """Return the places that the version's section names as broken, and its marked lines that are malformed."""
    section = re.search(rf"^## {re.escape(version)}$(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    marked = [line for line in (section[1] if section else "").splitlines() if "**breaking" in line.lower()]
    wellformed = [re.fullmatch(r"- \*\*Breaking\*\* (`[^`]+`(?:, `[^`]+`)*): \S.*", line) for line in marked]
    names = {name for match in wellformed if match for name in re.findall("`([^`]+)`", match[1])}
    return names, [line for line, match in zip(marked, wellformed, strict=True) if not match]


def is_named(change: Change, names: set[str]) -> bool:
    """Tell whether the names contain the change's place, one that it is in, or its operation."""
    return not names.isdisjoint([*accumulate(change.place), change.operation])


def differences(one: Any, other: Any, at: str = "", keys_are_names: bool = False) -> Iterator[str]:
    """Yield the places at which two documents differ in more than their texts."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if keys_are_names or key not in TEXTS:
                named = key in NAMED and not keys_are_names
                yield from differences(one.get(key, ABSENT), other.get(key, ABSENT), f"{at}/{key}", named)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from differences(mine, theirs, f"{at}/{index}")
    elif _text(one) != _text(other):
        yield at or "all of it"


def breaking_changes(old: Node, new: Node, today: date) -> list[Change]:
    """Return what breaks clients of the old document.

    :param old: an OpenAPI 3.1 document, as read from JSON; its references lead to places within it.
    :param today: says whether what is missing has had its time.
    :raises LookupError: if a reference leads nowhere, or back to itself.
    """
    comparison = _Comparison(old, new, today)
    comparison.documents()
    for path, item in old["paths"].items():
        comparison.path(path, item)
    return list(dict.fromkeys(comparison.changes))


class _Comparison:
    """Collects the breaking changes between two documents; `documents` and `path` begin with the outermost parts."""

    def __init__(self, old: Node, new: Node, today: date) -> None:
        self.changes: list[Change] = []
        self._old, self._new, self._today = old, new, today
        self._new_paths = {_template(path): path for path in new["paths"]}
        self._operation = ""
        self._compared: set[tuple[int, int, Side, frozenset[Effect]]] = set()

    def _report(self, at: Place, what: str, side: str = "") -> None:
        self.changes.append(Change(at, what, self._operation, side))

    def documents(self) -> None:
        """Compare what belongs to no operation."""
        servers = [[server["url"] for server in document.get("servers", ())] for document in (self._old, self._new)]
        for url in servers[0]:
            if url not in servers[1]:
                self._report((f"server {url}",), "removed")
        old, new = (document.get("components", {}) for document in (self._old, self._new))
        for name, scheme in old.get("securitySchemes", {}).items():
            if any(differences(scheme, new.get("securitySchemes", {}).get(name, ABSENT))):
                self._report((f"security scheme {name}",), "removed or changed")
        for name in old.get("schemas", {}):
            if name not in new.get("schemas", {}):
                self._report((name,), "schema removed; types of generated clients have its name")

    def path(self, path: str, item: Node) -> None:
        """Compare the operations at a path of the old document with those of the new one."""
        new_path = self._new_paths.get(_template(path), path)
        new_item = self._new["paths"].get(new_path, {})
        for method in METHODS:
            if method in item:
                self._operation = f"{method.upper()} {path}"
                self._compared.clear()
                if method not in new_item:
                    self._removed(item[method], (self._operation,))
                    continue
                self._operations(item[method], new_item[method], (self._operation,))
                if new_path != path:
                    self._report((self._operation,), f"path parameter renamed: {new_path}")
                old = _parameters(self._old, path, item, method)
                self._parameters(old, _parameters(self._new, new_path, new_item, method), (self._operation,))

    def _operations(self, old: Node, new: Node, at: Place) -> None:
        self._deprecation(old, new, at)
        if old.get("operationId", ABSENT) not in (ABSENT, new.get("operationId")):
            self._report(at, f"operationId {old['operationId']} → {_text(new.get('operationId', ABSENT))}")
        if old.get("tags", [])[:1] != new.get("tags", [])[:1]:
            self._report(at, f"first tag {_text(old.get('tags', ABSENT))} → {_text(new.get('tags', ABSENT))}")
        accepted = _security(self._new, new)
        for schemes in _security(self._old, old):
            if not any(fewer <= schemes for fewer in accepted):
                names = " and ".join(sorted(name for name, _ in schemes))
                self._report(at, f"{names or 'no login'} is no longer enough to be let in")
        before, after = _resolve(self._old, old.get("requestBody", {})), _resolve(self._new, new.get("requestBody", {}))
        self._bodies(before, after, (*at, " request"))
        for status in old["responses"]:
            if status not in new["responses"] and status[0] in "123":
                self._report((*at, f" response {status}"), "removed")
        for status, response in new["responses"].items():
            if status not in old["responses"]:
                self._report((*at, f" response {status}"), "new")
            else:
                before = _resolve(self._old, old["responses"][status])
                self._responses(before, _resolve(self._new, response), (*at, f" response {status}"))

    def _removed(self, old: Node, at: Place, what: str = "removed", side: str = "") -> None:
        """Report what is missing in the new document, unless it was deprecated and has had its time."""
        sunset = _sunset(old) if old.get("deprecated") else None
        if not sunset or self._today < sunset:
            self._report(at, f"{what} before its x-sunset, {sunset}" if sunset else what, side)

    def _deprecation(self, old: Node, new: Node, at: Place, side: str = "") -> None:
        if new.get("deprecated"):
            before, after = _sunset(old), _sunset(new)
            if not old.get("deprecated") and (not after or after < self._today + NOTICE):
                self._report(at, f"deprecated without an x-sunset at least {NOTICE.days} days from now", side)
            elif old.get("deprecated") and before and (not after or after < before):
                self._report(at, f"x-sunset {before} → {after or 'none'}", side)

    def _parameters(self, old: dict[str, Node], new: dict[str, Node], at: Place) -> None:
        for key, before in old.items():
            place = (*at, f" {before['in']} {before['name']}")
            if key in new:
                self._parameter(before, new[key], place)
            else:
                self._removed(before, place)
        for key, after in new.items():
            if key not in old and after.get("required"):
                self._report((*at, f" {after['in']} {after['name']}"), "new and required")

    def _parameter(self, old: Node, new: Node, at: Place) -> None:
        self._deprecation(old, new, at)
        if new.get("required") and not old.get("required"):
            self._report(at, "required now")
        if old.get("allowEmptyValue") and not new.get("allowEmptyValue"):
            self._report(at, "must not be empty now")
        for (keyword, before), after in zip(_serialization(old).items(), _serialization(new).values(), strict=True):
            if before != after:
                self._report(at, f"{keyword} {_text(before)} → {_text(after)}")
        self._schemas(old.get("schema", True), new.get("schema", True), at, "request")
        self._content(old, new, at, "request")

    def _bodies(self, old: Node, new: Node, at: Place) -> None:
        if old and not new:
            self._report(at, "body removed")
            return
        if new.get("required") and not old.get("required"):
            self._report(at, "body required now" if old else "body new and required")
        self._content(old, new, at, "request")

    def _responses(self, old: Node, new: Node, at: Place) -> None:
        for code in sorted(_codes(new) - _codes(old)):
            self._report(at, f"code {code} is new")
        headers = {name.lower(): _resolve(self._new, header) for name, header in new.get("headers", {}).items()}
        for name, raw in old.get("headers", {}).items():
            before, after, place = _resolve(self._old, raw), headers.get(name.lower()), (*at, f" header {name}")
            if after is None:
                self._removed(before, place)
                continue
            self._deprecation(before, after, place)
            if before.get("required") and not after.get("required"):
                self._report(place, "optional now")
            self._schemas(before.get("schema", True), after.get("schema", True), place, "response")
        self._content(old, new, at, "response")

    def _content(self, old: Node, new: Node, at: Place, side: Side) -> None:
        for media_type, before in old.get("content", {}).items():
            after = new.get("content", {}).get(media_type)
            if after is None:
                self._report(at, f"{media_type} removed")
                continue
            if any(differences(before.get("encoding"), after.get("encoding"))):
                self._report(at, f"encoding of {media_type} changed")
            self._schemas(before.get("schema", True), after.get("schema", True), at, side)

    def _schemas(self, old: Any, new: Any, at: Place, side: Side, breaking: frozenset[Effect] = frozenset()) -> None:
        """Compare two schemas.

        :param old: a part of the old document, not resolved yet, or `True`; so its id is its own.
        :param breaking: which effects are breaking, if not those that are on this side.
        """
        breaking = breaking or BREAKING[side]
        key = (id(old), id(new), side, breaking)
        if key in self._compared:  # in this operation, or in a cycle
            return
        self._compared.add(key)
        name = _schema_name(old)
        at = (name,) if name and name == _schema_name(new) else at
        if old is False or new is False:
            effects = frozenset[Effect]() if old is new else LOOSER if old is False else TIGHTER
            if effects & breaking:
                self._report(at, "allowed now" if old is False else "not allowed now", side)
            return
        before, after = _resolve(self._old, old), _resolve(self._new, new)
        choice, alone = _choice(before) or _choice(after), after if _choice(before) else before
        if choice and alone.keys() - ANNOTATIONS and alone.keys().isdisjoint(("anyOf", "oneOf")):
            # One schema is a choice of one.
            one, other = (before[choice], [new]) if _choice(before) else ([old], after[choice])
            self._lists(choice, one, other, at, side, breaking)
            return
        for effects, what in [*_values(before, after), *_limits(before, after)]:
            if effects & breaking:
                self._report(at, what, side)
        if "object" in _types(before) & _types(after):
            self._properties(before, after, at, side, breaking)
        for keyword, part in SCHEMAS_WITHIN.items():
            inner = EITHER if keyword in ("if", "not") else breaking
            self._schemas(before.get(keyword, True), after.get(keyword, True), (*at, part), side, inner)
        for keyword in MAPS_OF_SCHEMAS:
            one, other = before.get(keyword, {}), after.get(keyword, {})
            for name in sorted(one.keys() | other.keys()):
                place = (*at, f" {keyword} {name}")
                self._schemas(one.get(name, True), other.get(name, True), place, side, breaking)
        for keyword in LISTS_OF_SCHEMAS:
            if keyword == "prefixItems" or (keyword in before and keyword in after):
                self._lists(keyword, before.get(keyword, []), after.get(keyword, []), at, side, breaking)
            elif (keyword in before and LOOSER & breaking) or (keyword in after and TIGHTER & breaking):
                self._report(at, f"{keyword} {'removed' if keyword in before else 'new'}", side)

    def _properties(self, old: Node, new: Node, at: Place, side: Side, breaking: frozenset[Effect]) -> None:
        before, after = _visible(self._old, old, side), _visible(self._new, new, side)
        required = {*new.get("required", ())} - (new.get("properties", {}).keys() - after)
        was_required = {*old.get("required", ())} - (old.get("properties", {}).keys() - before)
        for name, schema in before.items():
            place = (*at, f".{name}")
            resolved = _resolve(self._old, schema)
            if name in after:
                self._deprecation(resolved, _resolve(self._new, after[name]), place, side)
                self._schemas(schema, after[name], place, side, breaking)
            else:
                hidden = "readOnly" if side == "request" else "writeOnly"
                self._removed(
                    resolved, place, f"{hidden} now" if name in new.get("properties", {}) else "removed", side
                )
        if TIGHTER & breaking:
            for name in sorted(required - was_required):
                self._report((*at, f".{name}"), "required now" if name in before else "new and required", side)
        if LOOSER & breaking:
            for name in sorted(was_required - required - (before.keys() - after.keys())):
                self._report((*at, f".{name}"), "optional now", side)

    def _lists(
        self, keyword: str, old: list[Any], new: list[Any], at: Place, side: Side, breaking: frozenset[Effect]
    ) -> None:
        """Compare the members of a list of schemas. They match by name, else as equals, else by position."""
        if keyword == "prefixItems":
            for index, (one, other) in enumerate(zip_longest(old, new, fillvalue=True)):
                self._schemas(one, other, (*at, f"[{index}]"), side, breaking)
            return
        left, added = list(old), []
        for schema in new:
            same = next((one for one in left if _label(one) == _label(schema)), None)
            if same is None:
                added.append(schema)
            else:
                left.remove(same)
                self._schemas(same, schema, at, side, breaking)
        unnamed = [[schema for schema in schemas if not _schema_name(schema)] for schemas in (left, added)]
        for index, (one, other) in enumerate(zip(*unnamed, strict=False)):
            self._schemas(one, other, (*at, f" {keyword} {index}"), side, breaking)
            left.remove(one)
            added.remove(other)
        if left and (TIGHTER if keyword != "allOf" else EITHER) & breaking:
            self._report(at, f"{keyword} no longer has {', '.join(map(_label, left))}", side)
        if added and (LOOSER if keyword != "allOf" else TIGHTER) & breaking:
            self._report(at, f"{keyword} has {', '.join(map(_label, added))} now", side)


def _resolve(document: Node, node: Any) -> Node:
    """Return what a reference leads to, with the keywords beside it; any other object as it is.

    :raises LookupError: if it leads nowhere or back to itself.
    """
    if isinstance(node, bool):
        return {} if node else {"not": {}}
    beside: Node = {}
    followed = set()
    while "$ref" in node:
        reference = node["$ref"]
        if reference in followed or not reference.startswith("#/"):
            raise LookupError(f"{reference}: leads back to itself, or out of the document")
        followed.add(reference)
        beside = {keyword: value for keyword, value in node.items() if keyword != "$ref"} | beside
        node = document
        try:
            for part in reference[2:].split("/"):
                node = node[part.replace("~1", "/").replace("~0", "~")]
        except (LookupError, TypeError):
            raise LookupError(f"{reference}: leads nowhere") from None
    return {**node, **beside} if beside else node


def _schema_name(schema: Any) -> str:
    """Return the name of the schema that a reference leads to, if it is that and nothing more."""
    reference = schema.get("$ref", "") if isinstance(schema, dict) else ""
    alone = reference and schema.keys() - ANNOTATIONS == {"$ref"}
    return reference.removeprefix(SCHEMAS) if alone and reference.startswith(SCHEMAS) else ""


def _label(schema: Any) -> str:
    if isinstance(schema, bool):
        return _text(schema)
    return _schema_name(schema) or _text({key: value for key, value in schema.items() if key not in TEXTS})


def _choice(schema: Node) -> str:
    """Return `anyOf` or `oneOf` if the schema is that and nothing more."""
    keywords = schema.keys() - ANNOTATIONS
    return next((keyword for keyword in ("anyOf", "oneOf") if keywords == {keyword}), "")


def _visible(document: Node, schema: Node, side: Side) -> Node:
    """Return the properties that this side has."""
    hidden = "readOnly" if side == "request" else "writeOnly"
    properties = schema.get("properties", {})
    return {name: one for name, one in properties.items() if not _resolve(document, one).get(hidden)}


def _values(old: Node, new: Node) -> Iterator[tuple[frozenset[Effect], str]]:
    """Yield what changed in the type, the allowed values, and the default."""
    before, after = _types(old), _types(new)
    effects = (TIGHTER if before - after else frozenset()) | (LOOSER if after - before else frozenset())
    yield effects, f"type {_text(old.get('type', ABSENT))} → {_text(new.get('type', ABSENT))}"
    one, other = _enumeration(old), _enumeration(new)
    if one is None or other is None:
        if one is not other:
            yield TIGHTER if one is None else LOOSER, "any value → some" if one is None else "some values → any"
    else:
        yield from ((TIGHTER, f"value {value} removed") for value in one if value not in other)
        yield from ((LOOSER, f"value {value} is new") for value in other if value not in one)
    for keyword in ("default", "discriminator"):
        before, after = old.get(keyword, ABSENT), new.get(keyword, ABSENT)
        if _text(before) != _text(after):
            yield EITHER, f"{keyword} {_text(before)} → {_text(after)}"


def _types(schema: Node) -> frozenset[str]:
    given = schema.get("type", TYPES)
    types = frozenset({given} if isinstance(given, str) else given)
    return types | {"integer"} if "number" in types else types


def _enumeration(schema: Node) -> list[str] | None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if values is None else [_text(value) for value in values]


def _limits(old: Node, new: Node) -> Iterator[tuple[frozenset[Effect], str]]:
    """Yield what changed in the keywords that limit values; one that is not known here must not change."""
    for keyword in sorted((old.keys() | new.keys()) - ANNOTATIONS - COMPARED_APART):
        before, after = (schema.get(keyword, DEFAULTS.get(keyword, ABSENT)) for schema in (old, new))
        if _text(before) == _text(after) or keyword.startswith("x-"):
            continue
        effects = EITHER
        if keyword in UPPER_LIMITS or keyword in LOWER_LIMITS:
            unlimited = inf if keyword in UPPER_LIMITS else -inf
            one, other = (unlimited if limit is ABSENT else limit for limit in (before, after))
            effects = TIGHTER if (other < one) == (keyword in UPPER_LIMITS) else LOOSER
        elif before is ABSENT or after is ABSENT:
            effects = TIGHTER if before is ABSENT else LOOSER
        elif keyword == "multipleOf":
            one, other = Decimal(str(before)), Decimal(str(after))
            effects = TIGHTER if not other % one else LOOSER if not one % other else EITHER
        yield effects, f"{keyword} {_text(before)} → {_text(after)}"


def _parameters(document: Node, path: str, item: Node, method: str) -> dict[str, Node]:
    """Return an operation's parameters, in place of its path's. Those in the path are known by their position."""
    parameters = {}
    for raw in [*item.get("parameters", ()), *item[method].get("parameters", ())]:
        parameter = _resolve(document, raw)
        name = parameter["name"].lower() if parameter["in"] == "header" else parameter["name"]
        if parameter["in"] == "path":
            name = str(re.findall("{([^}]*)}", path).index(name))
        parameters[f"{parameter['in']} {name}"] = parameter
    return parameters


def _serialization(parameter: Node) -> Node:
    style = parameter.get("style", "form" if parameter["in"] in ("cookie", "query") else "simple")
    reserved = parameter.get("allowReserved", False)
    return {"style": style, "explode": parameter.get("explode", style == "form"), "allowReserved": reserved}


def _security(document: Node, operation: Node) -> set[frozenset[tuple[str, str]]]:
    """Return the sets of schemes, each with its scopes, of which one lets a client in. Empty: nothing is needed."""
    ways = operation.get("security", document.get("security", []))
    return {frozenset((name, _text(sorted(scopes))) for name, scopes in way.items()) for way in ways or [{}]}


def _codes(response: Node) -> set[int]:
    """Return the business codes of failures that a response may have, from its description and its examples."""
    codes = {int(code) for code in re.findall(r"^- `(\d{3})`", response.get("description", ""), re.MULTILINE)}
    for content in response.get("content", {}).values():
        values = [content.get("example"), *(one.get("value") for one in content.get("examples", {}).values())]
        codes |= {value["code"] for value in values if isinstance(value, dict) and isinstance(value.get("code"), int)}
    return codes - {200}


def _sunset(node: Node) -> date | None:
    try:
        return date.fromisoformat(node.get("x-sunset", ""))
    except (TypeError, ValueError):
        return None


def _template(path: str) -> str:
    return re.sub("{[^}]*}", "{}", path)


def _text(value: Any) -> str:
    return "none" if value is ABSENT else json.dumps(value, ensure_ascii=False, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main())
