"""The API's documents: /openapi.json for programs, and the page /docs, where DOCS is on, to try them on."""

from mimetypes import guess_type
from pathlib import Path

from flask import Blueprint, Response, request

from errors import language

_HERE = Path(__file__).parent
_FILES = {"zh": "openapi.json", "en": "openapi.en.json"}
_DOCUMENTS = {name: (_HERE.parent / file).read_bytes() for name, file in _FILES.items()}

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Swagger UI has its icons in `data:`."""

documents = Blueprint("documents", __name__)
# flask-swagger-ui carries Swagger UI's files, so the page works without the internet.
page = Blueprint("docs", "flask_swagger_ui", static_folder="dist", static_url_path="/docs/assets")


@documents.get("/openapi.json")
def openapi() -> Response:
    """Return the document in the language that `lang`, or else the request's Accept-Language, asks for."""
    response = _respond(_DOCUMENTS.get(request.args.get("lang", "")) or _DOCUMENTS[language()], "application/json")
    response.vary.add("Accept-Language")
    return response


@page.get("/docs", defaults={"filename": "docs.html"})
@page.get("/docs/docs.js", defaults={"filename": "docs.js"})
@page.get("/docs/docs.css", defaults={"filename": "docs.css"})
def show(filename: str) -> Response:
    return _respond((_HERE / filename).read_bytes(), guess_type(filename)[0])


def _respond(content: bytes, mimetype: str | None) -> Response:
    response = Response(content, mimetype=mimetype)
    response.cache_control.no_cache = True
    response.add_etag()
    response.make_conditional(request)
    return response


@page.after_request
def _protect(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
