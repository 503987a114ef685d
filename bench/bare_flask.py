"""A Flask application with one route and nothing else: what the service's start and memory are compared with."""

from flask import Flask

app = Flask(__name__)


@app.get("/livez")
def live() -> dict[str, int]:
    return {"code": 200}
