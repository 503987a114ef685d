"""The service with parts of an export that take their time, and a route that says how many: `…slow_export:app`."""

import time
from collections.abc import Iterator
from typing import Any

from flask import jsonify
from werkzeug import Response

from storage import ownership
from wsgi import app

SECONDS = 8

read_all = ownership.read_all
reading: set[object] = set()
most = 0


def read_all_slowly(*args: Any) -> Iterator[Any]:
    global most
    for rows in read_all(*args):
        part = object()
        reading.add(part)
        most = max(most, len(reading))
        time.sleep(SECONDS)
        reading.remove(part)
        yield rows


def count() -> Response:
    return jsonify({"now": len(reading), "most": most})


ownership.read_all = read_all_slowly
app.add_url_rule("/parts", view_func=count)
