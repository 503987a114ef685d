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


def create_app(environ: Mapping[str, str] | None = None) -> Flask:
    """Make the WSGI application.

    :param environ: where the settings are read from; by default the environment and the file of ENV_FILE.
    :raises settings.SettingsError: listing every setting that is missing or malformed.
    """
    if environ is None:
        environ = settings.variables()
        # OpenTelemetry reads its own from there. A reload replaces each process that has made the application.
        os.environ.update({name: value for name, value in environ.items() if name.startswith("OTEL_")})
    app = Flask("service", static_folder=None)
    app.config.update(settings.load(environ))
    app.ensure_sync = lambda function: function  # type: ignore[assignment,method-assign]  # Flask looks for coroutines each time
    # Each uses those before it.
    for part in (proxies, concurrency, telemetry, storage, wechat, blueprints, errors):
        part.init_app(app)
    return app
