"""What comes in: JSON bodies, ids in URLs, codes of WeChat."""

import json
import re
from typing import Any, NoReturn

from flask import Request
from marshmallow import Schema, ValidationError, validate
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.routing import BaseConverter, IntegerConverter, Rule

from errors import ApiError, Code

Schema.error_messages = {"type": "Must be an object.", "unknown": "Unknown, or set by the server."}

MAXIMUM_ID = 2**63 - 1
SMALL_BODY = 8 * 1024
"""The longest body in bytes, unless its schema declares MAXIMUM_BYTES."""
MAXIMUM_LENGTH = 100
"""How many fields an object, and items a list in it may have: each takes longer to refuse than to send."""
WECHAT_CODE_RULE = validate.Regexp(r"^[!-~]{1,128}(?!\n)$", error="Not a valid WeChat code.")


class JsonParser(FlaskParser):
    """Reads request bodies as JSON, also without a Content-Type, and raises our errors.

    A schema may declare MAXIMUM_BYTES, and ANY_CONTENT_TYPE: the body is JSON whatever Content-Type says. That is only
    for a route that no cookie signs in, as any site may have a browser send text/plain.
    """

    DEFAULT_UNKNOWN_BY_LOCATION: dict[str, str | None] = {"query": None}  # noqa: RUF012  as the schema says: rejected

    def load_json(self, req: Request, schema: Schema) -> Any:
        if req.mimetype and not req.is_json and not getattr(schema, "ANY_CONTENT_TYPE", False):
            raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE)
        req.max_content_length = getattr(schema, "MAXIMUM_BYTES", SMALL_BODY)
        body = read_body(req)
        try:  # undecoded, json takes UTF-16 and lone surrogates too
            document = json.loads(body.decode(), object_pairs_hook=_object, parse_float=_number)
            if b"\\u" in body:
                json.dumps(document, ensure_ascii=False).encode()  # no database stores half a surrogate pair
        except (ValueError, RecursionError):
            raise ApiError(Code.INVALID_INPUT, errors={"body": ["Not valid JSON in UTF-8."]}) from None
        return document

    def handle_error(self, error: ValidationError, req: Request, schema: Schema, **kwargs: Any) -> NoReturn:
        (errors,) = error.normalized_messages().values()  # of the one location that was parsed
        raise ApiError(Code.INVALID_INPUT, errors=errors)


def _number(text: str) -> float:
    """Read 3.0 and 3e0 as the integers that they are, in JSON Schema too."""
    return int(number) if (number := float(text)).is_integer() else number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    lengths = [len(pairs), *(len(value) for value in document.values() if isinstance(value, list))]
    if max(lengths) > MAXIMUM_LENGTH or len(document) < len(pairs):
        wrong = f"More than {MAXIMUM_LENGTH} fields in an object or items in a list, or a field twice."
        raise ApiError(Code.INVALID_INPUT, errors={"body": [wrong]})
    return document


def read_body(req: Request) -> bytes:
    """Read a request's body.

    :raises ApiError: PAYLOAD_TOO_LARGE if it is longer than the route allows, INVALID_INPUT if it does not match its
        headers.
    """
    try:
        body = req.get_data()
        # werkzeug cuts the body off at its limit if the server says where it ends, as gunicorn does.
        if "wsgi.input_terminated" in req.environ and req.environ["wsgi.input"].read(1):
            raise RequestEntityTooLarge
    except RequestEntityTooLarge:
        raise ApiError(Code.PAYLOAD_TOO_LARGE, errors={"body": [f"At most {req.max_content_length} bytes."]}) from None
    except Exception:  # noqa: BLE001  each server has its own exception for a body that does not match its headers
        raise ApiError(Code.INVALID_INPUT, errors={"body": ["Does not match its headers: send it again."]}) from None
    return body


class IdConverter(IntegerConverter):
    """An id in a URL: of at most 18 digits, which fits the database; anything else is not found."""

    regex = r"[1-9][0-9]{0,17}"


class UserIdConverter(BaseConverter):
    """The id of a user in a URL, or `me`."""

    regex = f"me|{IdConverter.regex}"


def openapi_path(rule: Rule) -> str:
    """Return the path of a route as OpenAPI writes it, such as `/api/v1/orders/{order_id}`."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)


CONVERTERS = {"id": IdConverter, "user": UserIdConverter}
"""What stands in the rules of routes, as in `<id:order_id>`."""
