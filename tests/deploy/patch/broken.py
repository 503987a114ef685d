"""The ways in which a release can be broken, and how to change one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], Any]


def add(file: str, text: str, before: str = "") -> Change:
    """Return a change that adds lines to the end of a file, or before a line."""

    def change(tree: Path) -> None:
        lines = (tree / file).read_text()
        assert before in lines
        changed = lines.replace(before, f"{text}\n{before}", 1) if before else f"{lines}\n{text}\n"
        (tree / file).write_text(changed)

    return change


EACH_REQUEST = "@app.before_request\ndef fail():\n    {}\n"
CREATED = "gc.collect()"
BROKEN: dict[str, tuple[Change, str]] = {
    "a syntax error": (add("blueprints/orders.py", "def ("), "SyntaxError"),
    "an import error": (add("blueprints/orders.py", "from errors import nothing_like_it"), "nothing_like_it"),
    "a dependency that is not installed": (add("blueprints/orders.py", "import no_such_package"), "no_such_package"),
    "a crash at the start": (
        add("service.py", "    raise RuntimeError('at the start')", "    return app"),
        "at the start",
    ),
    "an exit at the start": (add("wsgi.py", "raise SystemExit(0)"), "ended"),
    "a sudden end at the start": (add("wsgi.py", "import os; os._exit(0)"), "ended"),
    "a crash on each request": (add("wsgi.py", EACH_REQUEST.format("1 / 0"), CREATED), "500"),
    "a hang at the start": (add("wsgi.py", "import time; time.sleep(600)"), "hangs"),
    "a hang without end at the start": (add("wsgi.py", "while True: pass"), "hangs"),
    "a hang on each request": (
        add("wsgi.py", EACH_REQUEST.format("import time; time.sleep(600)"), CREATED),
        "hangs",
    ),
    "too much memory at the start": (add("wsgi.py", "hog = [bytearray(2**20) for _ in range(2**20)]"), "ended"),
    "a setting that is missing": (add("settings.py", '    NEW = _required("New.")', "    WECHAT_APP_ID ="), "NEW"),
    "a broken gunicorn.conf.py": (add("gunicorn.conf.py", "workers = 1 / 0"), "ZeroDivisionError"),
    "a gunicorn.conf.py that is no Python": (add("gunicorn.conf.py", "def ("), "SyntaxError"),
    "a broken settings.py": (add("settings.py", "raise ValueError('broken settings')"), "broken settings"),
    "a worker that does not start": (
        add("gunicorn.conf.py", "def post_worker_init(worker):\n    raise RuntimeError('no worker')"),
        "ended",
    ),
    "another address": (add("gunicorn.conf.py", "bind = '[127.0.0.1]:1'"), "change at a restart only"),
    "a worker that is not ready": (
        add(
            "blueprints/health.py", '    raise ApiError(Code.UNAVAILABLE, errors={"redis": ["no"]})', "    is_stopping"
        ),
        "503",
    ),
}
