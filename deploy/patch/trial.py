"""Start a worker of the code in this folder, apart from those that serve, and let it make a first request to itself.

    python -m deploy.patch.trial ADDRESS BIND

gunicorn.conf.py runs this before a reload, as gunicorn stops the server if a new worker does not start. The worker is
one of supervisor.py, which ends before it may serve. The exit status is 0 if it could; else stderr says what is wrong,
with the stack if there is one.

ADDRESS is that of what serves: if Redis or the database is away, the new worker need not be ready either. BIND is what
its gunicorn.conf.py says of it, and the new one must say, too: gunicorn would stop the server if it cannot listen
elsewhere. The trial accepts no connection, counts in no metric, and takes no message that was pushed.
"""

import ast
import asyncio
import json
import os
import socket
import sys
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from deploy.patch.supervisor import ANOTHER_ADDRESS, Generation, Refused

COMMAND = [sys.executable, "-m", "gunicorn", "--config", "deploy/patch/generation.py"]
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"
OF_THE_MASTER = ("GUNICORN_", "NOTIFY_SOCKET", "SUPERVISOR_", MULTIPROC_DIR)
"""How the names of variables begin that tell the master that serves what it is."""


async def is_ready(address: Any) -> bool:
    """Ask what serves, at a host and a port, or at a path."""
    with suppress(OSError):
        async with asyncio.timeout(5):
            at_port = isinstance(address, tuple)
            opening = asyncio.open_connection(*address[:2]) if at_port else asyncio.open_unix_connection(address)
            reader, writer = await opening
            writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
            return b" 200 " in await reader.readline()
    return False


async def try_out(folder: Path, address: Any, bind: str) -> None:
    """Start a worker, with its sockets and metrics in a folder, and end it. Raises Refused if it cannot serve."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_MASTER)}
    environ["TRIAL_METRICS"] = str(folder / "metrics")
    generation = Generation("", COMMAND, Path.cwd(), folder / "private", "")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "listener"))
        listener.listen()
        try:
            await generation.start(listener, environ)
            if generation.address != bind:
                raise Refused(ANOTHER_ADDRESS)
            await generation.add_worker(await is_ready(address), may_serve=False)
        finally:
            generation.stop()  # which lets it write what it has logged
            await asyncio.wait({generation.ended}, timeout=1)
            generation.kill()
            await asyncio.wait({generation.ended}, timeout=5)


def last_stack(output: Path) -> str:
    """Return the stack of the last exception that was logged, if there is any."""
    stack = ""
    for line in output.read_text(errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError):  # it has none, or is no line of the log
            stack = json.loads(line)["stack"]
    return stack


def main() -> None:
    beside = os.path.dirname(os.environ.get(MULTIPROC_DIR, "")) or None  # the one place that can always be written to
    with tempfile.TemporaryDirectory(prefix="kuaishang-trial-", dir=beside) as name:
        output = Path(name, "output")
        with output.open("w") as file, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            os.dup2(file.fileno(), 1)  # what the worker logs is no part of the log
            try:
                asyncio.run(try_out(Path(name), ast.literal_eval(sys.argv[1]), sys.argv[2]))
            except Refused as error:
                sys.exit(f"{error}\n{last_stack(output)}".strip())


if __name__ == "__main__":
    main()
