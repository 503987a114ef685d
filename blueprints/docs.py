"""The API's documents: /openapi.json for programs, and the page /docs, where DOCS is on, to try them on."""

from mimetypes import guess_type
from pathlib import Path

from flask import Blueprint, Response, request

from errors import language

_HERE = Path(__file__).parent
_FILES = {"zh": "openapi.json", "en": "openapi.en.json"}

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
    response = _send(_HERE.parent / (_FILES.get(request.args.get("lang", "")) or _FILES[language()]))
    response.vary.add("Accept-Language")
    return response


@page.get("/docs", defaults={"filename": "docs.html"})
@page.get("/docs/docs.js", defaults={"filename": "docs.js"})
@page.get("/docs/docs.css", defaults={"filename": "docs.css"})
def show(filename: str) -> Response:
    return _send(_HERE / filename)


def _send(path: Path) -> Response:
    response = Response(path.read_bytes(), mimetype=guess_type(path)[0], headers={"Cache-Control": "no-cache"})
    response.add_etag()
    return response.make_conditional(request)  # type: ignore[return-value]


@page.after_request
def _protect(response: Response) -> Response:
    response.headers |= {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
    return response
