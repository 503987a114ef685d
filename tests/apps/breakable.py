"""The service, unless the file BROKEN_IF exists: `gunicorn tests.apps.breakable:app`."""

import os
from pathlib import Path

from wsgi import app

__all__ = ["app"]

if Path(os.environ["BROKEN_IF"]).exists():
    raise RuntimeError("broken")
