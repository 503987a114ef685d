"""The application factory: reads the settings and puts the parts together, in order."""

import os
from collections.abc import Mapping

from flask import Flask

import blueprints
import concurrency
import errors
import proxies
import settings
import storage
import telemetry
import wechat


def create_app(environ: Mapping[str, str] = os.environ) -> Flask:
    """Make the WSGI application.

    :param environ: where the settings are read from; see settings.py.
    :raises settings.SettingsError: listing every setting that is missing or malformed.
    """
    app = Flask("service", static_folder=None)
    app.config.update(settings.load(environ))
    app.ensure_sync = lambda function: function  # type: ignore[assignment,method-assign]  # Flask looks for coroutines each time
    # Each uses those before it. errors comes last, as flask-smorest's own handler would drop headers such as Allow.
    for part in (proxies, concurrency, telemetry, storage, wechat, blueprints, errors):
        part.init_app(app)
    return app
