"""What `make run` serves: the application. With the WeChat simulator, its page /docs gets a button that logs in.

Reads SIMULATOR_URL, the address of the simulator, which dev/run.py sets. The button is for browsers on this machine.
"""

import os
from pathlib import Path

import requests
from flask import Response, abort, request, send_from_directory

from proxies import parse_address
from wsgi import app

__all__ = ["app"]

SCRIPT = "docs_login.js"


def is_local() -> bool:
    """Whether the request comes from this machine: like the simulator, which others cannot reach."""
    address = parse_address(request.remote_addr or "")
    return bool(address and address.is_loopback)


@app.after_request
def _add_button(response: Response) -> Response:
    if request.path == "/docs" and response.status_code == 200 and "SIMULATOR_URL" in os.environ and is_local():
        response.data += f'<script type="module" src="/docs/{SCRIPT}"></script>\n'.encode()
        response.cache_control.no_store = True  # its ETag is that of the page without a button
    return response


@app.get(f"/docs/{SCRIPT}")
def docs_login() -> Response:
    return send_from_directory(Path(__file__).parent, SCRIPT)


@app.post("/docs/code")
def make_code() -> dict[str, str]:
    """Return a code of the simulator, of a new user: `{"code": "…"}`, as wx.login does on a phone."""
    if "SIMULATOR_URL" not in os.environ or not is_local():
        abort(404)
    return {"code": requests.post(f"{os.environ['SIMULATOR_URL']}/simulator/codes", timeout=5).json()["code"]}
