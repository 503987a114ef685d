"""The service of `kuaishang demo`: brings its database up to date, then serves on the socket FD that it inherits."""

import os
import subprocess
import sys

SERVE = ["gunicorn", "dev.wsgi:app", "--log-level", "warning", "--graceful-timeout", "1", "--bind"]


def main() -> None:
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], check=True)
    os.execv(sys.executable, [sys.executable, "-m", *SERVE, f"fd://{sys.argv[1]}"])


if __name__ == "__main__":
    main()
