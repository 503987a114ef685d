"""The service with more time before a second call to WeChat, to hang up: `gunicorn tests.apps.long_pause:app`."""

from wechat import transport
from wsgi import app

__all__ = ["app"]

transport.RETRY_PAUSE_SECONDS = 3
