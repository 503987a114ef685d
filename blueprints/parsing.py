"""What comes in: JSON bodies, ids in URLs, codes of WeChat."""

import json
from typing import Any, NoReturn

from flask import Request
from marshmallow import Schema, ValidationError, validate
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter, IntegerConverter, Map

from errors import ApiError, Code

MAXIMUM_ID = 2**63 - 1
WECHAT_CODE_RULE = validate.Regexp(r"^[!-~]{1,128}(?!\n)$", error="Not a valid WeChat code.")
WECHAT_CODE_LIFETIME_SECONDS = 300
"""After that WeChat itself rejects a code."""


class JsonParser(FlaskParser):
    """Reads request bodies as JSON, also without a Content-Type, and raises our errors."""

    DEFAULT_VALIDATION_STATUS = 400
    DEFAULT_UNKNOWN_BY_LOCATION: dict[str, str | None] = {"query": None}  # noqa: RUF012  as the schema says: rejected

    def load_json(self, req: Request, schema: Schema) -> Any:
        if req.mimetype and not req.is_json:
            raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE)
        body = read_body(req)
        try:
            document = json.loads(body.decode()) if body else {}  # undecoded, json takes UTF-16 and lone surrogates too
            if b"\\u" in body:
                json.dumps(document, ensure_ascii=False).encode()  # no database stores half a surrogate pair
        except (ValueError, RecursionError):
            raise ApiError(Code.INVALID_INPUT, errors={"body": ["Not valid JSON in UTF-8."]}) from None
        return document

    def handle_error(self, error: ValidationError, req: Request, schema: Schema, **kwargs: Any) -> NoReturn:
        (errors,) = error.normalized_messages().values()  # of the one location that was parsed
        raise ApiError(Code.INVALID_INPUT, errors=errors)


def read_body(req: Request) -> bytes:
    """Read a request's body.

    :raises ApiError: INVALID_INPUT if it does not match its headers.
    :raises werkzeug.exceptions.RequestEntityTooLarge: if it is longer than MAX_CONTENT_LENGTH.
    """
    try:
        body = req.get_data()
        req.stream.read(1)  # werkzeug cuts a chunked body off at MAX_CONTENT_LENGTH; only reading on raises the 413
    except HTTPException:
        raise
    except Exception:  # noqa: BLE001  each server has its own exception for a body that does not match its headers
        raise ApiError(Code.INVALID_INPUT, errors={"body": ["Cannot be read."]}) from None
    return body


class IdConverter(IntegerConverter):
    """An id in a URL: from 1 to the database's maximum; anything else is not found."""

    openapi = {"type": "integer", "format": "int64", "minimum": 1, "maximum": MAXIMUM_ID}  # noqa: RUF012

    def __init__(self, map: Map) -> None:  # noqa: A002
        super().__init__(map, min=1, max=MAXIMUM_ID)


class UserIdConverter(BaseConverter):
    """The id of a user in a URL, or `me`."""

    regex = r"me|[1-9][0-9]{0,17}"
    openapi = {"type": "string", "pattern": f"^({regex})$"}  # noqa: RUF012


CONVERTERS = {"id": IdConverter, "user": UserIdConverter}
"""What stands in the rules of routes, as in `<id:order_id>`."""
