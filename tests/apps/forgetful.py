"""The service with a bug: it loses and doubles orders that it has acknowledged: `gunicorn tests.apps.forgetful:app`."""

import itertools

from flask import Response, current_app, request
from sqlalchemy import text

from wsgi import app

__all__ = ["app"]

numbers = itertools.count(1)
LOSE = "DELETE FROM orders WHERE id = :id"
DOUBLE = (
    "INSERT INTO orders (user_id, status, remark, total, created_at, updated_at, version)"
    " SELECT user_id, status, remark, total, created_at, updated_at, version FROM orders WHERE id = :id"
)


@app.after_request
def forget(response: Response) -> Response:
    if response.status_code == 201 and request.path == "/api/v1/orders":
        number = next(numbers)
        if number % 5 in (0, 1):
            with current_app.extensions["database"].begin() as connection:
                statement = text(LOSE if number % 5 else DOUBLE)
                connection.execute(statement, {"id": response.get_json()["data"]["id"]})
    return response
