"""A group of routes, with our envelope and ETags around what they return; what it notes is what openapi.json says.

Versions, ETags and If-Match: nobody overwrites a version that they have not read (RFC 9110, section 13).
"""

import re
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import flask
from flask import Flask, Response, g, request
from marshmallow import Schema, fields

from blueprints import idempotency
from blueprints.parsing import JsonParser
from errors import ApiError, Code, Message, envelope, language
from storage import database, sessions
from storage.models import Versioned

VERSION_TEXT = Message("用作 If-Match，须加引号", "For If-Match, in quotes")
VERSION = fields.Integer(dump_only=True, required=True, metadata={"example": 1, "description": VERSION_TEXT})
"""The field of every schema of a versioned row."""

IF_MATCH_PATTERN = r"(\*|TAG( *, *TAG)*)".replace("TAG", '((W/)?"[!#-~]*"|[0-9]+)')
"""Tags as in RFC 9110, or a bare version."""

TIME = {"example": "2026-11-26T08:00:00Z"}

Convert = Callable[[Any], Any]


class AuthPolicy(NamedTuple):
    """Who may call a group of routes."""

    check: Callable[[], None]
    """Runs before each view; raises ApiError to reject a request."""
    security: list[dict[str, list[str]]]
    """The same as OpenAPI security requirements: any one of these schemes; none at all if empty."""
    fails: tuple[Code, ...] = ()
    """The codes of a rejection."""


class Blueprint(flask.Blueprint):
    """A group of routes whose successes respond in the envelope."""

    cache_control = "private, no-cache"
    """Of a success, if the group demands a session."""
    auth: AuthPolicy

    def __init__(self, name: str, import_name: str, *, title: Message, **options: Any) -> None:
        """Make a group. The documents show its title."""
        super().__init__(name, import_name, **options)
        self.title = title

    @staticmethod
    def arguments(schema: Any, *, location: str = "json", example: dict[str, Any] | None = None) -> Any:
        """Pass what was sent to the view, loaded by the schema.

        :param location: `json` or `query`.
        :param example: of a body, in the documents; by default it is made of those of its fields.
        """
        schema = schema() if isinstance(schema, type) else schema  # once: webargs would make one for each request
        decorate = JsonParser().use_args(schema, location=location)
        return lambda view: documented(decorate(view), **{location: schema, f"{location}_example": example})

    def response(
        self, status_code: int, schema: Any = None, *, transaction: bool = True, if_match: bool = True, **documents: Any
    ) -> Callable[..., Any]:
        """Respond in the envelope, with an ETag: the version of the row that the view returns, or a hash of the body;
        a response that is streamed has none.

        A POST, PUT or DELETE runs in one transaction, which is committed; it is run again if it lost a race against
        another one. A POST takes an Idempotency-Key; with 201 it responds with the Location of the row, which is its id
        below the list's. A PUT or DELETE must call `require_match`.

        :param schema: of `data`; or, of a view that makes a response which is not JSON, its OpenAPI schema as a dict.
        :param transaction: False for a view that stores nothing in the database or begins its own transactions; its
            POST takes no Idempotency-Key.
        :param if_match: False for a PUT or DELETE of something without a version.
        :param documents: `content_type` of a response that is not JSON; `example`, which replaces the examples of these
            fields; `etag=False` of one that is streamed.
        """
        dump = dumper(schema()) if isinstance(schema, type) else None
        documents |= {"status": status_code, "schema": schema, "transaction": transaction, "if_match": if_match}

        def decorate(view: Callable[..., Any]) -> Any:
            def make_response(method: str, *args: Any, **arguments: Any) -> Response:
                row = g.row = view(*args, **arguments)
                if if_match and method in ("PUT", "DELETE") and "version_checked" not in g:
                    raise RuntimeError(f"{request.endpoint} does not call require_match")
                return self._respond(row, dump, status_code, method in sessions.SAFE_METHODS)

            @wraps(view)
            def wrapper(*args: Any, **arguments: Any) -> Response:
                if (method := request.method) in sessions.SAFE_METHODS or not transaction:
                    return make_response(method, *args, **arguments)
                run = idempotency.run_once if method == "POST" else database.in_transaction
                return run(partial(make_response, method, *args, **arguments))

            return documented(wrapper, **documents)

        return decorate

    def _respond(self, row: Any, dump: Convert | None, status: int, is_read: bool) -> Response:
        """Make the response of a view from what it returns, which may be one already; a 304 if the caller has it."""
        is_versioned, is_secured = hasattr(row, "etag"), bool(self.auth.security)
        if is_versioned and not is_read:
            database.session.flush()  # which gives it its id and its version
        response: Response = row
        if not isinstance(row, Response):
            data = {} if row is None else dump(row) if dump else row
            response = Response(envelope(Code.SUCCESS, data), status, content_type="application/json")
        if status == 201:
            response.headers["Location"] = f"{request.script_root}{request.path}/{row.id}"
        if is_secured:
            response.headers["Vary"] = "Authorization, Cookie, Accept-Language, Origin"
            response.headers["Cache-Control"] = self.cache_control
        if is_versioned:
            response.headers["ETag"] = f'"{row.etag}-{language()}"'  # with the language, as messages are translated
        elif is_read and is_secured and not response.is_streamed:
            response.add_etag()
        # Not with If-Match, with which werkzeug would make a 412 of the body of a 200.
        if is_read and "ETag" in response.headers and "If-None-Match" in request.headers and not request.if_match:
            response.make_conditional(request)
        return response

    @staticmethod
    def fails(*codes: Code, **messages: Message) -> Any:
        """Document codes with which an operation can fail, beyond those of its policy, its body and its transaction.

        :param messages: by the names of further codes their messages here, which are not the codes' own.
        """
        texts = {code: code.message for code in codes} | {Code[name]: text for name, text in messages.items()}
        return lambda view: documented(view, fails=vars(view).get("documents", {}).get("fails", {}) | texts)


def documented(view: Any, **documents: Any) -> Any:
    """Note on a view what dev/openapi.py says of it."""
    view.documents = {**vars(view).get("documents", {}), **documents}
    return view


def require_match(row: Versioned) -> None:
    """Let a request pass only if its If-Match names the current version.

    By RFC 9110 a weak ETag never matches. Here it does: ours name versions, whatever a proxy that compresses makes of
    them, and whatever the language.

    :raises ApiError: PRECONDITION_REQUIRED without a valid If-Match, PRECONDITION_FAILED if it names another version.
    """
    if not re.fullmatch(IF_MATCH_PATTERN, request.headers.get("If-Match", "")):
        raise ApiError(Code.PRECONDITION_REQUIRED)
    current = f"{row.version}-", f"{row.etag}-"  # what follows is the language, or a proxy's
    tags = [f"{tag}-" for tag in request.if_match.as_set(include_weak=True)]
    if not request.if_match.star_tag and not any(tag.startswith(current) for tag in tags):
        raise ApiError(Code.PRECONDITION_FAILED)
    g.version_checked = True


def dumper(schema: Schema) -> Convert:
    """Make the function that dumps an object, or a dict, as this schema declares it."""
    parts = [(name, _converter(name, field)) for name, field in schema.dump_fields.items()]

    def dump(source: Any) -> dict[str, Any]:
        get = source.__getitem__ if isinstance(source, dict) else partial(getattr, source)
        return {name: convert(get(name)) if convert else get(name) for name, convert in parts}

    return dump


def _converter(name: str, field: fields.Field[Any]) -> Convert | None:
    # What typed columns and views return has the right type already.
    if type(field) in (fields.Integer, fields.String, fields.Boolean):
        return None
    if isinstance(field, fields.Nested):
        return dumper(field.schema)
    if isinstance(field, fields.List) and (convert := _converter(name, field.inner)):
        return lambda values: [convert(value) for value in values]
    return partial(field._serialize, attr=name, obj=None)  # what a field's own class overrides


def register(app: Flask, group: Blueprint, *, auth: AuthPolicy, **options: Any) -> None:
    """Mount a group of routes, with the policy that says who may call it. Without one it cannot be mounted."""
    group.auth = auth
    app.register_blueprint(group, **options)
    app.before_request_funcs.setdefault(group.name, []).insert(0, auth.check)  # before its own hooks
