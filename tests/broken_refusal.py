"""The service without a part of what makes gunicorn's own answers ours; BROKEN says which."""

import os

import errors
from telemetry import traces
from wsgi import app

__all__ = ["app"]

module, _, name = os.environ["BROKEN"].partition(".")
setattr({"errors": errors, "traces": traces}[module], name, None)
