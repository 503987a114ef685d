"""The application with routes that wait, each in its own way, and one that says what became of them."""

import time

from flask import jsonify
from werkzeug import Response

from wsgi import app

given_up: list[str] = []


def sleep(seconds: float) -> Response:
    try:
        time.sleep(seconds)
    except BaseException as error:
        given_up.append(f"sleep: {type(error).__name__}")
        raise
    return jsonify({})


def sleep_on(seconds: float) -> Response:
    """Need so long to clean up that the response could not wait for it."""
    try:
        time.sleep(seconds)
    finally:
        time.sleep(seconds)
    return jsonify({})


def large() -> Response:
    """More than any buffer between us and a client that does not read."""
    return Response(b"x" * 50_000_000)


app.add_url_rule("/large", view_func=large)
app.add_url_rule("/sleep/<float:seconds>", view_func=sleep)
app.add_url_rule("/sleep-on/<float:seconds>", view_func=sleep_on)
app.add_url_rule("/given-up", view_func=lambda: jsonify(given_up))
