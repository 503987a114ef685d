"""ETags and If-Match: nobody overwrites a version that they have not read (RFC 9110, section 13)."""

from typing import Any

from flask import Response, g, request

from errors import LANGUAGES, ApiError, Code, language
from storage.models import Versioned

ETAG_HEADER = {"ETag": {"schema": {"type": "string"}}}
IF_MATCH = {"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}}
IF_MATCH["description"] = "The ETag of the version that was read: 412 if it has changed since."


def require_match(row: Versioned) -> None:
    """Let a request pass only if its If-Match names the current version.

    :raises ApiError: PRECONDITION_REQUIRED without If-Match, PRECONDITION_FAILED if it names another version.
    """
    if not request.if_match:
        raise ApiError(Code.PRECONDITION_REQUIRED)
    if not any(request.if_match.contains(f"{row.etag}-{tag}") for tag in LANGUAGES):
        raise ApiError(Code.PRECONDITION_FAILED)
    g.version_checked = True


def set_etag(response: Response, row: Any, *, hash_body: bool) -> Response:
    """Give a response its ETag, and make it a 304 if If-None-Match names that.

    :param row: its version is the ETag, with the language, as messages are translated.
    :param hash_body: whether a read without a version gets a hash of its body.
    """
    is_read = request.method in ("GET", "HEAD")
    if hasattr(row, "etag"):
        response.set_etag(f"{row.etag}-{language()}")
    elif is_read and hash_body:
        response.add_etag()
    if is_read:
        response.make_conditional(request)
    return response
