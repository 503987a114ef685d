"""flask-smorest's Api and Blueprint, with our envelope and ETags around what they respond and document.

Versions, ETags and If-Match: nobody overwrites a version that they have not read (RFC 9110, section 13).

Two private hooks of flask-smorest 0.47 are overridden, as nothing public serves: `_prepare_etag_doc`, which completes
the documents of an operation, and `_register_pagination_header`.
"""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import flask_smorest
from flask import Flask, Response, g, request
from marshmallow import Schema, fields

from blueprints import docs, idempotency
from blueprints.parsing import CONVERTERS, SMALL_BODY, JsonParser
from errors import HEADERS, ApiError, Code, Message, envelope, language
from storage import database, sessions
from storage.models import Versioned

TRACE_ID_HEADER: dict[str, Any] = {"X-Trace-Id": {"schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"}}}
TRACE_ID_HEADER["X-Trace-Id"]["description"] = "Finds this request in the logs."

VERSION = fields.Integer(dump_only=True, required=True, metadata={"description": "For If-Match, in quotes."})
"""The field of every schema of a versioned row."""

DOCUMENTED_HEADERS = {201: ["ETag", "Location"], 302: ["Location"], 429: ["RateLimit", "RateLimit-Policy"]}
"""Of the responses of a status, beside the trace id and `errors.HEADERS`."""
IF_MATCH = {"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}, "example": '"7"'}
IF_MATCH["description"] = "The `version` that was read, quoted, or its ETag: 412 if it has changed since."

Convert = Callable[[Any], Any]


class ErrorDetails(Schema):
    errors = fields.Dict(keys=fields.String(), values=fields.Raw(), metadata={"description": "Problems by field."})


class ErrorEnvelope(Schema):
    """The body of every error. For documentation; `errors.envelope` makes it."""

    code = fields.Integer(required=True, metadata={"enum": [code.number for code in Code if code is not Code.SUCCESS]})
    message = fields.String(required=True)
    data = fields.Nested(ErrorDetails, required=True, allow_none=True)


class AuthPolicy(NamedTuple):
    """Who may call a group of routes."""

    check: Callable[[], None]
    """Runs before each view; raises ApiError to reject a request."""
    security: list[dict[str, list[str]]]
    """The same as OpenAPI security requirements: any one of these schemes; none at all if empty."""
    fails: tuple[Code, ...] = ()
    """The codes of a rejection."""


class PreparedResponse(Response):
    """A response whose headers are sent as they are where werkzeug would copy them and change nothing."""

    def get_wsgi_headers(self, environ: Any) -> Any:
        is_prepared = self.status_code == 200 and "Content-Length" in self.headers
        return self.headers if is_prepared else super().get_wsgi_headers(environ)


class Blueprint(flask_smorest.Blueprint):
    """A group of routes whose successes respond in the envelope."""

    ARGUMENTS_PARSER = JsonParser()
    error_content: dict[str, Any] = {"application/json": {"schema": ErrorEnvelope}}  # noqa: RUF012  of the documents
    cache_control = "private, no-cache"
    """Of a success, if the group demands a session."""
    auth: AuthPolicy

    def arguments(self, schema: Any, **options: Any) -> Any:
        """Pass what was sent, loaded by one instance of the schema: webargs would make one for each request."""
        return super().arguments(schema() if isinstance(schema, type) else schema, **options)

    def route(self, rule: str, **options: Any) -> Any:
        """Make a route as Flask does; one that names something by its id may find nothing."""
        decorate = super().route(rule, **options)
        return lambda view: decorate(self.fails(Code.NOT_FOUND)(view) if "<" in rule else view)

    def response(
        self, status_code: int, schema: Any = None, *, transaction: bool = True, if_match: bool = True, **kwargs: Any
    ) -> Callable[..., Any]:
        """Respond in the envelope, with an ETag: the version of the row that the view returns, or a hash of the body.

        A POST, PUT or DELETE runs in one transaction, which is committed; it is run again if it lost a race against
        another one. A POST takes an Idempotency-Key; with 201 it responds with the Location of the row, which is its id
        below the list's. A PUT or DELETE must call `require_match`.

        :param transaction: False for a view that stores nothing in the database or begins its own transactions; its
            POST takes no Idempotency-Key.
        :param if_match: False for a PUT or DELETE of something without a version.
        :param etag: False for a GET that streams its response.
        """
        has_etag = kwargs.pop("etag", True)
        # A view that responds with something other than JSON documents it in OpenAPI's own terms.
        document = super().response(status_code, schema if isinstance(schema, dict) else _enveloped(schema), **kwargs)
        dump = dumper(schema()) if isinstance(schema, type) else None

        def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
            documented = document(view)  # flask-smorest's wrapper, of which nothing but the documents is used

            def make_response(method: str, *args: Any, **arguments: Any) -> Response:
                row = g.row = view(*args, **arguments)
                if if_match and method in ("PUT", "DELETE") and "version_checked" not in g:
                    raise RuntimeError(f"{request.endpoint} does not call require_match")
                return self._respond(row, dump, status_code, has_etag and method in sessions.SAFE_METHODS)

            @wraps(documented)
            def wrapper(*args: Any, **arguments: Any) -> Response:
                if (method := request.method) in sessions.SAFE_METHODS or not transaction:
                    return make_response(method, *args, **arguments)
                run = idempotency.run_once if method == "POST" else database.in_transaction
                return run(partial(make_response, method, *args, **arguments))

            wrapper._apidoc.update(transaction=transaction, if_match=if_match, has_etag=has_etag)  # type: ignore[attr-defined]
            return wrapper

        return decorate

    def _respond(self, row: Any, dump: Convert | None, status: int, is_read: bool) -> Response:
        """Make the response of a view from what it returns, which may be one already; a 304 if the caller has it."""
        is_versioned, is_secured = hasattr(row, "etag"), bool(self.auth.security)
        if is_versioned and not is_read:
            database.session.flush()  # which gives it its id and its version
        response: Response = row
        if not isinstance(row, Response):
            data = {} if row is None else dump(row) if dump else row
            response = PreparedResponse(envelope(Code.SUCCESS, data), status, content_type="application/json")
        if status == 201:
            response.headers["Location"] = f"{request.script_root}{request.path}/{row.id}"
        if is_secured:
            response.headers["Vary"] = "Authorization, Cookie, Accept-Language, Origin"
            response.headers["Cache-Control"] = self.cache_control
        if is_versioned:
            response.headers["ETag"] = f'"{row.etag}-{language()}"'  # with the language, as messages are translated
        elif is_read and is_secured:
            response.add_etag()
        # Not with If-Match, with which werkzeug would make a 412 of the body of a 200.
        if is_read and "If-None-Match" in request.headers and not request.if_match:
            response.make_conditional(request)
        return response

    @staticmethod
    def fails(*codes: Code, **messages: Message) -> Callable[..., Any]:
        """Document codes with which an operation can fail, beyond those of its policy, its body and its transaction.

        :param messages: by the names of further codes their messages here, which are not the codes' own.
        """
        texts = {code: code.message for code in codes} | {Code[name]: text for name, text in messages.items()}

        def decorate(view: Any) -> Any:
            documents = vars(view).setdefault("_apidoc", {}).setdefault("fails", {})
            documents.update({code: text.english for code, text in texts.items()})
            return view

        return decorate

    def _prepare_etag_doc(self, doc: Any, doc_info: Any, *, method: str, **kwargs: Any) -> Any:
        """Document our ETags, not flask-smorest's, and the headers and failures of an operation."""
        doc["security"] = self.auth.security
        codes, responses, headers = [*self.auth.fails], doc["responses"], {**DOCUMENTED_HEADERS}
        if "arguments" in doc_info:
            codes += [Code.INVALID_INPUT]
        if "requestBody" in doc:
            body = doc["requestBody"]["content"]["application/json"]["schema"]
            codes += [Code.PAYLOAD_TOO_LARGE]
            codes += [] if getattr(body, "ANY_CONTENT_TYPE", False) else [Code.UNSUPPORTED_MEDIA_TYPE]
            doc["requestBody"].setdefault("description", f"At most {getattr(body, 'MAXIMUM_BYTES', SMALL_BODY)} bytes.")
        if method == "post" and doc_info.get("transaction"):
            doc.setdefault("parameters", []).append(idempotency.PARAMETER)
            codes += [Code.INVALID_INPUT, Code.IDEMPOTENCY_KEY_REUSED, Code.CONFLICT]
        if method in ("put", "delete") and doc_info.get("if_match"):
            doc.setdefault("parameters", []).append(IF_MATCH)
            codes += [Code.PRECONDITION_REQUIRED, Code.PRECONDITION_FAILED, Code.CONFLICT]
        if method in ("get", "put") and doc_info.get("has_etag") and self.auth.security:
            headers |= {200: ["ETag"], 304: ["ETag"]}
            responses |= {304: {"description": "Not modified."}} if method == "get" else {}
        texts = {code: code.message.english for code in codes} | doc_info.get("fails", {})
        for status in sorted({code.status for code in texts}):
            lines = [f"{code.number}: {texts[code]}" for code in Code if code in texts and code.status == status]
            responses[status] = {"description": "; ".join(lines), "content": self.error_content}
        for status in responses.keys() - {"default"}:
            names = [*HEADERS.get(status, ()), *headers.get(status, ())]
            responses[status]["headers"] = {name: {"schema": {"type": "string"}} for name in names} | TRACE_ID_HEADER
        return doc


@cache
def _enveloped(schema: type[Schema] | None) -> type[Schema]:
    """Describe the envelope around a schema; one class for each, as OpenAPI names it after the class."""
    data = fields.Nested(schema, required=True) if schema else fields.Dict(required=True, metadata={"maxProperties": 0})
    code = fields.Integer(required=True, metadata={"enum": [Code.SUCCESS.number]})
    name = f"{schema.__name__.removesuffix('Schema') if schema else 'Empty'}Envelope"
    return Schema.from_dict({"code": code, "message": fields.String(required=True), "data": data}, name=name)


def require_match(row: Versioned) -> None:
    """Let a request pass only if its If-Match names the current version.

    By RFC 9110 a weak ETag never matches. Here it does: ours name versions, whatever a proxy that compresses makes of
    them, and whatever the language.

    :raises ApiError: PRECONDITION_REQUIRED without If-Match, PRECONDITION_FAILED if it names another version.
    """
    if not request.if_match:
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


class Api(flask_smorest.Api):
    """Registers blueprints, each with the policy that says who may call it."""

    ERROR_SCHEMA = ErrorEnvelope

    def __init__(self, app: Flask) -> None:
        app.url_map.converters.update(CONVERTERS)
        app.config.update(docs.CONFIG, API_VERSION=app.config["RELEASE"]["version"], MAX_CONTENT_LENGTH=SMALL_BODY)
        super().__init__(app)
        for converter in CONVERTERS.values():
            self.register_converter(converter, lambda converter: converter.openapi)

    def _register_pagination_header(self) -> None:
        """A list names its page in the envelope, not in a header."""

    def register_blueprint(self, blp: Blueprint, *, auth: AuthPolicy, **options: Any) -> None:
        """Mount a group of routes. Without a policy it cannot be mounted."""
        blp.auth = auth
        super().register_blueprint(blp, **options)
        self._app.before_request_funcs.setdefault(blp.name, []).insert(0, auth.check)  # before its own hooks
