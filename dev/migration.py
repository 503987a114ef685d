"""Writes the next migration from what storage/models.py has changed: `make migration NAME=coupons`. It needs no server.

Read what it writes, by the rule in storage/migrations/env.py; `deploy/patch/check.py` holds it to that rule.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from alembic import command
from alembic.config import Config

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / "storage/migrations/versions"


def main() -> None:
    name = os.environ.get("NAME", "")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name):
        sys.exit("Say what it does in a few words: make migration NAME=coupons_have_a_price")
    print("new     ", write_migration(name).relative_to(ROOT))


def write_migration(name: str) -> Path:
    """Write the revision after the last one, and return its file."""
    number = int(max(path.name[:4] for path in VERSIONS.glob("[0-9]*.py"))) + 1
    config = Config(toml_file=ROOT / "pyproject.toml")
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/empty.db"
        with patch.dict(os.environ, DATABASE_URL=url, ENV_FILE=os.devnull):
            command.upgrade(config, "head")
            command.revision(config, name, autogenerate=True, rev_id=f"{number:04}")
    (path,) = VERSIONS.glob(f"{number:04}_*.py")
    path.write_text(tidy(path.read_text()))
    return path


def tidy(text: str) -> str:
    """Take out Alembic's remarks, and what drops the indexes of a table that goes: MariaDB refuses that; see env.py."""
    for table in re.findall(r'op\.drop_table\("(\w+)"\)', text):
        text = re.sub(rf'^    op\.drop_index\(.*table_name="{table}".*\n', "", text, flags=re.MULTILINE)
    return re.sub(r"^    # ### .*\n", "", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
