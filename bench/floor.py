"""The floor: a constant response under gunicorn. No service can be faster on the same server."""

from collections.abc import Callable, Iterable
from typing import Any

BODY = b'{"code":200,"message":"Success","data":{}}'
HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return [BODY]
