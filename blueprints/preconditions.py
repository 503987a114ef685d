"""Versions, ETags and If-Match: nobody overwrites a version that they have not read (RFC 9110, section 13)."""

from flask import Response, g, request
from marshmallow import fields

from errors import ApiError, Code, language
from storage.models import Versioned

VERSION = fields.Integer(dump_only=True, required=True, metadata={"description": "For If-Match, in quotes."})
"""The field of every schema of a versioned row."""

ETAG_HEADER = {"ETag": {"schema": {"type": "string"}}}
IF_MATCH = {"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}, "example": '"7"'}
IF_MATCH["description"] = "The `version` that was read, quoted, or its ETag: 412 if it has changed since."


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


def set_etag(response: Response, row: Versioned | None, *, hash_body: bool) -> Response:
    """Give a response its ETag, and make it a 304 if If-None-Match names that.

    :param row: its version is the ETag, with the language, as messages are translated.
    :param hash_body: whether a read without a version gets a hash of its body.
    """
    is_read = request.method in ("GET", "HEAD") and not response.is_streamed  # a hash would read it to the end
    if row is not None:
        response.headers["ETag"] = f'"{row.etag}-{language()}"'
    elif is_read and hash_body:
        response.add_etag()
    # Not with If-Match, with which werkzeug would make a 412 of the body of a 200.
    if is_read and "If-None-Match" in request.headers and not request.if_match:
        response.make_conditional(request)
    return response
