"""The door: what gunicorn, or any other WSGI server, calls."""

from service import create_app

app = create_app()
