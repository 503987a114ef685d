"""Exits with 0 if the service in this container responds to /livez, otherwise with another status and the reason.

For HEALTHCHECK: it needs neither a shell nor curl, and little time to start. HOST and PORT come from the environment
alone, not from a file of settings.
"""

import os
import socket
import sys

TIMEOUT_SECONDS = 4


def main() -> None:
    host, port = ((os.environ.get(name) or "").strip() for name in ("HOST", "PORT"))
    # An address that stands for all of them, such as 0.0.0.0, leads to this machine too.
    with socket.create_connection((host or "127.0.0.1", int(port or 8000)), TIMEOUT_SECONDS) as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        status = connection.makefile("rb").readline().split()[1:2]
    if status != [b"200"]:
        sys.exit(f"/livez: {status}")


if __name__ == "__main__":
    main()
