"""flask-smorest's Api and Blueprint, with our envelope around what they answer and document."""

import hashlib
import json
import re
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, NamedTuple, NoReturn

import flask_smorest
from flask import Flask, Request, g, request
from marshmallow import Schema, ValidationError, fields, validate, validates_schema
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import HTTPException
from werkzeug.routing import IntegerConverter, Map

from errors import LANGUAGES, ApiError, Code, ErrorEnvelope, Message, envelope, language
from storage import database, idempotency
from storage.models import Versioned
from telemetry.redaction import hide

TRACE_ID_HEADER = {
    "X-Trace-Id": {
        "description": "Finds this request in the logs.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    }
}
ETAG_HEADER = {"ETag": {"schema": {"type": "string"}}}
IF_MATCH = {"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}}
IF_MATCH["description"] = "The ETag of what was read: 412 if it has changed since."
IDEMPOTENCY_KEY = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 255}}
IDEMPOTENCY_KEY["description"] = "Of the caller's making: sent again within a day, the first answer comes again."
MAXIMUM_ID = 2**63 - 1
MAXIMUM_SKIP = 100_000
HEADERS_BY_STATUS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string", "enum": ["Bearer"]}}},
    503: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
}


class JsonParser(FlaskParser):
    """Reads request bodies as JSON, also without a Content-Type, and raises our errors."""

    DEFAULT_VALIDATION_STATUS = 400
    DEFAULT_UNKNOWN_BY_LOCATION: dict[str, str | None] = {"query": None}  # noqa: RUF012  as the schema has it: refused

    def load_json(self, req: Request, schema: Schema) -> Any:
        if req.mimetype and not req.is_json:
            raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE)
        body = read_body(req)
        try:
            document = json.loads(body.decode()) if body else {}  # undecoded, json takes UTF-16 and lone surrogates too
            if b"\\u" in body:
                json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair can be kept nowhere
        except (ValueError, RecursionError):
            raise ApiError(Code.INVALID_INPUT, errors={"body": ["Not valid JSON in UTF-8."]}) from None
        hide(document)
        return document

    def handle_error(self, error: ValidationError, req: Request, schema: Schema, **kwargs: Any) -> NoReturn:
        (errors,) = error.normalized_messages().values()  # of the one location that was parsed
        raise ApiError(Code.INVALID_INPUT, errors=errors)


def read_body(req: Request) -> bytes:
    """Read a request's body.

    :raises ApiError: INVALID_INPUT if it is not as the headers say.
    :raises werkzeug.exceptions.RequestEntityTooLarge: if it is longer than MAX_CONTENT_LENGTH.
    """
    try:
        body = req.get_data()
        req.stream.read(1)  # werkzeug cuts a chunked body off at MAX_CONTENT_LENGTH; only reading on raises the 413
    except HTTPException:
        raise
    except Exception:  # noqa: BLE001  each server has its own for a body that is not as its headers say
        raise ApiError(Code.INVALID_INPUT, errors={"body": ["Cannot be read."]}) from None
    return body


def require_match(row: Versioned) -> None:
    """Let a request pass only if its If-Match names the version that is there now.

    :raises ApiError: PRECONDITION_REQUIRED without If-Match, PRECONDITION_FAILED if it names another version.
    """
    if not request.if_match:
        raise ApiError(Code.PRECONDITION_REQUIRED)
    if not any(request.if_match.contains(f"{row.etag}-{language}") for language in LANGUAGES):
        raise ApiError(Code.PRECONDITION_FAILED)
    g.version_checked = True


def is_read() -> bool:
    return request.method in ("GET", "HEAD")


def _answer_once(answer: Callable[[], Any]) -> Any:
    """Run a POST in one transaction; the answer of one with an Idempotency-Key is stored in it."""
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return database.in_transaction(answer)
    if not re.fullmatch(r"[!-~]{1,255}", key):
        raise ApiError(Code.INVALID_INPUT, errors={"Idempotency-Key": ["Not 1 to 255 characters of ASCII."]})
    fingerprint = _fingerprint()  # reads the body, so it comes before the transaction
    return database.in_transaction(lambda: idempotency.answer_once(g.user_id, key, fingerprint, answer))


def _fingerprint() -> str:
    """What makes a request another one than that which came under the same Idempotency-Key."""
    return hashlib.sha256(f"{request.method} {request.full_path} ".encode() + read_body(request)).hexdigest()


class IdConverter(IntegerConverter):
    """An id in a URL: from 1 to what the database can hold; anything else leads nowhere."""

    def __init__(self, map: Map) -> None:  # noqa: A002
        super().__init__(map, min=1, max=MAXIMUM_ID)


class ListSchema(Schema):
    """Which page of a list; subclasses add filters."""

    page = fields.Integer(load_default=1, validate=validate.Range(1, 1_000_000))
    page_size = fields.Integer(load_default=20, validate=validate.Range(1, 100))
    after = fields.Integer(
        load_default=None,
        validate=validate.Range(1, MAXIMUM_ID),
        metadata={
            "description": "The id of the last item of the page before: deep pages then cost what the first does."
        },
    )
    sort = fields.String(
        load_default="-created_at",
        validate=validate.OneOf(["created_at", "-created_at"]),
        metadata={"description": "Newest first, unless without the minus."},
    )

    @validates_schema
    def _not_too_deep(self, query: dict[str, Any], **kwargs: Any) -> None:
        if query["page"] * query["page_size"] > MAXIMUM_SKIP and query.get("after") is None:
            raise ValidationError(f"Not beyond {MAXIMUM_SKIP:,} items: use after.", "page")


@cache
def page_schema(item: type[Schema]) -> type[Schema]:
    """Describe a page of a list of such items."""
    return Schema.from_dict(
        {
            "items": fields.List(fields.Nested(item), required=True),
            "page": fields.Integer(required=True),
            "page_size": fields.Integer(required=True),
            "total": fields.Integer(required=True),
        },
        name=f"{item.__name__.removesuffix('Schema')}PageSchema",
    )


class AuthPolicy(NamedTuple):
    """Who may come in to a group of routes."""

    check: Callable[[], None]
    """Run before each view; raises ApiError to keep a request out."""
    security: list[dict[str, list[str]]]
    """The same in OpenAPI's words: any one of these security schemes; none at all if empty."""
    fails: tuple[Code, ...] = ()
    """The codes with which a request is kept out."""


class Blueprint(flask_smorest.Blueprint):
    """A group of routes whose successes answer in the envelope."""

    ARGUMENTS_PARSER = JsonParser()
    auth: AuthPolicy

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare_doc_cbks.append(self._prepare_failures_doc)

    def response(
        self, status_code: int, schema: Any = None, *, transaction: bool = True, if_match: bool = True, **kwargs: Any
    ) -> Callable[..., Any]:
        """Answer in the envelope, with an ETag: that of the version of what the view returns, or of the body.

        A POST, PUT or DELETE runs in one transaction, which commits, and again where another one was faster. A POST may
        bring an Idempotency-Key: the same one gives the same answer for a day. A PUT or DELETE calls `require_match`.

        :param transaction: False for a view that stores nothing in the database, or begins transactions by itself; its
            POST takes no Idempotency-Key.
        :param if_match: False for a PUT or DELETE that changes what has no version.
        """
        kwargs.setdefault("headers", TRACE_ID_HEADER)
        decorator: Callable[..., Any] = super().response(status_code, schema, **kwargs)

        def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(view)
            def flushed(*args: Any, **arguments: Any) -> Any:
                result = view(*args, **arguments)
                if if_match and request.method in ("PUT", "DELETE") and "version_checked" not in g:
                    raise RuntimeError(f"{request.endpoint} does not call require_match")
                row = result[0] if isinstance(result, tuple) else result
                if hasattr(row, "etag"):
                    database.session.flush()  # for what that gives it: its id, its version
                g.etag = getattr(row, "etag", None)
                return result

            respond = decorator(flushed)

            @wraps(respond)
            def tagged(*args: Any, **arguments: Any) -> Any:
                response = respond(*args, **arguments)
                if self.auth.security:
                    response.vary.update(["Authorization", "Cookie", "Accept-Language"])
                    response.cache_control.private = response.cache_control.no_cache = True
                if g.etag is not None:
                    response.set_etag(f"{g.etag}-{language()}")
                elif is_read() and self.auth.security:
                    response.add_etag()
                return response.make_conditional(request) if is_read() else response

            @wraps(tagged)
            def stored(*args: Any, **arguments: Any) -> Any:
                answer = partial(tagged, *args, **arguments)
                if is_read() or not transaction:
                    return answer()
                return _answer_once(answer) if request.method == "POST" else database.in_transaction(answer)

            stored._apidoc = {**stored._apidoc, "transaction": transaction, "if_match": if_match}  # type: ignore[attr-defined]
            return stored

        return decorate

    @staticmethod
    def fails(*codes: Code, message: Message | None = None) -> Callable[..., Any]:
        """Document codes with which an operation can fail, beyond those that its policy and its body bring along.

        :param message: what they say here, unless it is what they always say.
        """

        def decorate(view: Any) -> Any:
            documented = getattr(view, "_apidoc", {})
            texts = {code: (message or code.message).english for code in codes}
            view._apidoc = {**documented, "fails": {**documented.get("fails", {}), **texts}}
            return view

        return decorate

    def _prepare_failures_doc(self, doc: dict[str, Any], doc_info: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        doc["security"] = self.auth.security
        codes = [*self.auth.fails]
        if "requestBody" in doc:
            codes += [Code.INVALID_INPUT, Code.PAYLOAD_TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE]
        if kwargs["method"] == "post" and doc_info.get("transaction"):
            doc.setdefault("parameters", []).append(IDEMPOTENCY_KEY)
            codes += [Code.INVALID_INPUT, Code.IDEMPOTENCY_KEY_REUSED]
        if kwargs["method"] in ("put", "delete") and doc_info.get("if_match"):
            doc.setdefault("parameters", []).append(IF_MATCH)
            codes += [Code.PRECONDITION_REQUIRED, Code.PRECONDITION_FAILED]
        if self.auth.security and kwargs["method"] == "get" and "200" in map(str, doc["responses"]):
            doc["responses"][304] = {"description": "Not modified since If-None-Match.", "headers": ETAG_HEADER}
        texts = {code: code.message.english for code in codes} | doc_info.get("fails", {})
        for status in sorted({code.status for code in texts}):
            lines = [f"{code.number}: {texts[code]}" for code in Code if code in texts and code.status == status]
            doc["responses"][status] = {
                "description": "; ".join(lines),
                "headers": {**TRACE_ID_HEADER, **HEADERS_BY_STATUS.get(status, {})},
                "content": {"application/json": {"schema": ErrorEnvelope}},
            }
        return doc

    @staticmethod
    def _prepare_response_content(data: Any) -> dict[str, Any]:
        return envelope(Code.SUCCESS, {} if data is None else data)

    @staticmethod
    def _make_doc_response_schema(schema: Schema | dict[str, Any] | None) -> type[Schema] | dict[str, Any]:
        if isinstance(schema, dict):
            return schema  # a view that answers something else than JSON says so in OpenAPI's own words
        return _success_envelope(schema and type(schema))


@cache
def _success_envelope(schema: type[Schema] | None) -> type[Schema]:
    """Describe the envelope around what a schema dumps; one class for each, as OpenAPI names it after the class."""
    return Schema.from_dict(
        {
            "code": fields.Integer(required=True, metadata={"enum": [Code.SUCCESS.number]}),
            "message": fields.String(required=True),
            "data": fields.Nested(schema, required=True)
            if schema
            else fields.Dict(required=True, metadata={"maxProperties": 0}),
        },
        name=f"{schema.__name__.removesuffix('Schema') if schema else 'Empty'}Envelope",
    )


class Api(flask_smorest.Api):
    """Registers blueprints, each of them with the policy that says who may come in."""

    ERROR_SCHEMA = ErrorEnvelope

    def __init__(self, app: Flask) -> None:
        app.url_map.converters["id"] = IdConverter
        super().__init__(app)
        self.register_converter(
            IdConverter, lambda _: {"type": "integer", "format": "int64", "minimum": 1, "maximum": MAXIMUM_ID}
        )

    def _register_error_handlers(self) -> None:
        """errors.py has handlers for all; flask-smorest's own would drop headers such as Allow."""

    def _register_pagination_header(self) -> None:
        """A list says in the envelope which page it is, not in a header."""

    def register_blueprint(self, blp: Blueprint, *, auth: AuthPolicy, **options: Any) -> None:
        """Mount a group of routes. Its policy is named here or it is not mounted at all."""
        blp.auth = auth
        super().register_blueprint(blp, **options)
        self.guard(blp.name, auth=auth)

    def guard(self, name: str, *, auth: AuthPolicy) -> None:
        """Let a policy decide who may come in to the blueprint of this name, before its own hooks run."""
        self._app.before_request_funcs.setdefault(name, []).insert(0, auth.check)
