"""Takes an instance out of HAProxy, does something to it, and puts it back.

    drain.py web-1                         take it out: return when no request is on it any more
    drain.py web-1 -- ssh web-1 restart    the same; then run the command, wait until /readyz answers 200, put it back
    drain.py --ready web-1                 put it back

Where several HAProxies are in front, name the runtime socket of each with --socket; `ssh -L` brings one of another
machine here. With --state the file of `server-state-file` is written, too, so that it stays out over a reload or
restart of the first of them, which is that of this machine. It names only who is out, and the slots of deploy/registry:
HAProxy would take the port and the health of any other instance from there, too, and not from its configuration.

Exit status: 0 done; 1 not done, with the instance left out: its requests did not end, the command failed, or it did not
become ready; 2 wrong arguments. The last instance that is up is not taken out. Needs nothing but Python 3.
"""

import argparse
import csv
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BACKENDS = "kuaishang", "unready"
"""The second gets the requests while no instance of the first is ready."""


class Failed(Exception):
    """Why an instance stays as it is."""


def ask(path: str, command: str) -> str:
    """Send a command to a runtime socket, and return the answer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(path)
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode().strip()
    except OSError as error:
        raise Failed(f"{path}: {error}") from None


def servers(path: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return what HAProxy says of each instance, by backend and name."""
    rows = csv.DictReader(ask(path, "show stat").removeprefix("# ").splitlines())
    return {(row["pxname"], row["svname"]): row for row in rows if row["pxname"] in BACKENDS}


def state_file(path: str) -> str:
    """Return what HAProxy's next process must know: who is out, and the addresses that are not in its configuration."""
    version, names, *lines = ask(path, "show servers state").splitlines()
    rows = (dict(zip(names.split()[1:], line.split(), strict=False)) for line in lines)
    kept = [" ".join(row.values()) for row in rows if row["srv_admin_state"] != "0" or row["srv_fqdn"] != "-"]
    return "\n".join([version, names, *kept, ""])


def set_state(options: argparse.Namespace, state: str) -> None:
    """Set it at all HAProxies: ready, drain or maint."""
    for path in options.socket:
        for backend in BACKENDS:
            if said := ask(path, f"set server {backend}/{options.server} state {state}"):
                raise Failed(f"{path}: {said}")
    if options.state:
        draft = options.state.with_suffix(".draft")
        draft.write_text(state_file(options.socket[0]))
        os.replace(draft, options.state)
    print(f"{options.server}: {state}", flush=True)


def wait_until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"{otherwise} after {seconds:g} s")
        time.sleep(0.1)


def is_ready(address: str) -> bool:
    with suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(address, timeout=2)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description="Take an instance out of HAProxy, and put it back.")
    parser.add_argument("--socket", action="append", help="runtime socket, default: /run/haproxy/admin.sock")
    parser.add_argument("--seconds", type=float, default=60, help="how long to wait for each step (default: 60)")
    parser.add_argument("--state", type=Path, metavar="FILE", help="where HAProxy keeps who is out")
    parser.add_argument("--ready", action="store_true", help="put it back")
    parser.add_argument("server")
    parser.add_argument("command", nargs="*", metavar="-- COMMAND")
    options = parser.parse_args()
    options.socket = options.socket or ["/run/haproxy/admin.sock"]
    try:
        for path in options.socket:
            there = {name: row for (backend, name), row in servers(path).items() if backend == BACKENDS[0]}
            if options.server not in there:
                raise Failed(f"{path}: there is no such server in {BACKENDS[0]}")
            others = [row for name, row in there.items() if name not in (options.server, "BACKEND")]
            if not (options.ready or any(row["status"].startswith("UP") for row in others)):
                raise Failed(f"{path}: no other instance is up")
        address = there[options.server]["addr"]
        if not options.ready:
            set_state(options, "drain")

            def is_idle() -> bool:
                of_each = (servers(path) for path in options.socket)
                return all(of_one[backend, options.server]["scur"] == "0" for of_one in of_each for backend in BACKENDS)

            wait_until(is_idle, options.seconds, "it still has requests")
            if not options.command:
                return 0
            if status := subprocess.run(options.command).returncode:
                raise Failed(f"{options.command[0]} ended with status {status}")
            wait_until(lambda: is_ready(address), options.seconds, "its /readyz does not answer 200")
            set_state(options, "maint")  # from which it comes back slowly
        set_state(options, "ready")
    except Failed as error:
        print(f"{options.server}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
