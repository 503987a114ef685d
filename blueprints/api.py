"""flask-smorest's Api and Blueprint, with our envelope around what they answer and document."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, NoReturn

import flask_smorest
from flask import Request
from marshmallow import Schema, ValidationError, fields
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import HTTPException

from errors import ApiError, Code, ErrorEnvelope, Message, envelope

TRACE_ID_HEADER = {
    "X-Trace-Id": {
        "description": "Finds this request in the logs.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    }
}
HEADERS_BY_STATUS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string", "enum": ["Bearer"]}}},
    503: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
}


class JsonParser(FlaskParser):
    """Reads request bodies as JSON, also without a Content-Type, and raises our errors."""

    DEFAULT_VALIDATION_STATUS = 400

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


class AuthPolicy(NamedTuple):
    """Who may come in to a group of routes."""

    check: Callable[[], None]
    """Run before each view; raises ApiError to keep a request out."""
    security: list[dict[str, list[str]]]
    """The same in OpenAPI's words: any one of these security schemes; none at all if empty."""


class Blueprint(flask_smorest.Blueprint):
    """A group of routes whose successes answer in the envelope."""

    ARGUMENTS_PARSER = JsonParser()
    auth: AuthPolicy

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare_doc_cbks.append(self._prepare_failures_doc)

    def response(self, status_code: int, schema: Any = None, **kwargs: Any) -> Callable[..., Any]:
        kwargs.setdefault("headers", TRACE_ID_HEADER)
        decorator: Callable[..., Any] = super().response(status_code, schema, **kwargs)
        return decorator

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
        codes = []
        if self.auth.security:
            codes += [Code.UNAUTHORIZED, Code.UNAVAILABLE]
        if "requestBody" in doc:
            codes += [Code.INVALID_INPUT, Code.PAYLOAD_TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE]
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
