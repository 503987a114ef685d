"""Writes openapi.json from the code: `make openapi`. A test compares the file with it."""

import base64
import json
from pathlib import Path

from service import create_app

PATH = Path(__file__).resolve().parent.parent / "openapi.json"


def document() -> str:
    # It needs no connection, so any well-formed settings do.
    app = create_app(
        {
            "WECHAT_APP_ID": "wx0123456789abcdef",
            "WECHAT_APP_SECRET": "none",
            "REDIS_URL": "redis://127.0.0.1",
            "DATABASE_URL": "sqlite:///none.db",
            "SECRET_KEY": "for the document alone, no secret",
            "ENCRYPTION_KEYS": base64.b64encode(bytes(32)).decode(),
        }
    )
    made = app.extensions["flask-smorest"]["apis"][""]["ext_obj"].spec.to_dict()
    return json.dumps(made, ensure_ascii=False, indent=2) + "\n"


def main() -> None:
    PATH.write_text(document())


if __name__ == "__main__":
    main()
