"""The application with routes that respond without reading the body, each in its own way."""

from flask import redirect
from werkzeug import Response

from errors import ApiError, Code
from wsgi import app


def fail(name: str) -> None:
    raise ApiError(Code[name])


def crash() -> None:
    raise RuntimeError


def moved() -> Response:
    return redirect("/elsewhere")


def not_modified() -> Response:
    return Response(status=304)


app.add_url_rule("/fail/<name>", view_func=fail, methods=["POST"])
app.add_url_rule("/crash", view_func=crash, methods=["POST"])
app.add_url_rule("/redirect", view_func=moved, methods=["POST"])
app.add_url_rule("/not-modified", view_func=not_modified)
