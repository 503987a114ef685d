"""Programs that run apart: in a temporary folder, with limits, and killed at the end with all that they started."""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from deploy.patch.supervisor import end_with

FILE_BYTES = 256 * 1024 * 1024
"""What a program may write into a file."""
LAST_BYTES, LAST_LINES = 256 * 1024, 12
"""What is read of its output, and what of that is shown."""
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Refused(Exception):
    """The release may not serve; the text says why, and where."""


class Program:
    """A process in a group of its own, its output in a file."""

    def __init__(self, name: str, folder: Path, popen: "subprocess.Popen[bytes]", output: Path, ends: float) -> None:
        self._name = name
        self._folder = folder
        self._popen = popen
        self._output = output
        self._ends = ends

    def status(self) -> int | None:
        """Return how it ended: None if it runs, negative if a signal killed it."""
        return self._popen.poll()

    def wait(self) -> int:
        """Wait for its end, and return how it ended.

        :raises Refused: if it takes too long.
        """
        try:
            return self._popen.wait(self._ends - time.monotonic())
        except subprocess.TimeoutExpired:
            raise Refused(f"{self._name} hangs, or is too slow") from None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def text(self) -> str:
        """Return the end of its output so far, log lines as text."""
        with self._output.open("rb") as file:
            file.seek(max(0, self._output.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(map(_readable, lines))

    def failure(self) -> str:
        """Say how it ended and why: the last exception, and the last line of the release that led to it."""
        status, text = self.status(), self.text()
        how = "" if status is None else f" ended with status {status}"
        if status is not None and status < 0:
            how = f" was killed by {signal.Signals(-status).name}"
        # The last line of a traceback begins at the margin: `ValueError: too short`.
        trace = text.rpartition("Traceback (most recent call last):\n")[2]
        error = re.search(r"^\w[\w.]*(:.*)?$", trace, re.MULTILINE)
        if trace == text or not error:
            lines = [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
            return "\n    ".join([f"{self._name}{how}", *lines])
        frames = re.findall(r'File "(.+?)", line (\d+)', trace[: error.start()])
        ours = [frame for frame in frames if frame[0].startswith(f"{self._folder}/")] or frames
        where = ":".join(ours[-1]).removeprefix(f"{self._folder}/") if ours else "?"
        return f"{self._name}{how}: {where}: {error[0][:500]}"


def _readable(line: str) -> str:
    with suppress(ValueError):
        fields = json.loads(line)
        if isinstance(fields, dict):
            return f"{fields.get('level')} {fields.get('message')}\n{fields.get('stack') or ''}".rstrip()
    return line


class Workshop:
    """A temporary folder, and all programs that are started.

    :param seconds: how long all of it may take.
    :param memory: MB of data that each process may have.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self.ends = time.monotonic() + seconds
        self.folder = Path(tempfile.mkdtemp(prefix="kuaishang-check-"))
        self._programs: list[Program] = []
        self._ports: list[int] = []
        self._limits = {
            resource.RLIMIT_DATA: memory * 1024 * 1024,
            resource.RLIMIT_FSIZE: FILE_BYTES,
            resource.RLIMIT_CORE: 0,
        }
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # a process whose parent has died is then our child
        os.nice(5)  # what serves on this machine goes first

    def listen(self) -> socket.socket:
        """Listen on a port, for a program that inherits it: nobody else gets the port, and connections wait."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._ports.append(listener.getsockname()[1])
        return listener

    def start(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        environ: Mapping[str, str],
        inherited: Sequence[int] = (),
    ) -> Program:
        """Start a program.

        :param name: what messages call it.
        :param folder: the release that it runs in.
        :param inherited: file descriptors that it gets.
        """
        output = self.folder / f"output-{len(self._programs)}"
        with output.open("wb") as file:
            popen = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(self._limit, os.getpid()),
                pass_fds=inherited,
            )
        self._programs.append(Program(name, folder, popen, output, self.ends))
        return self._programs[-1]

    def _limit(self, parent: int) -> None:
        """Limit the new process, before its program begins."""
        for kind, most in self._limits.items():
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
        if sys.platform == "linux":
            end_with(parent)  # should this check itself be killed
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go if the machine's memory runs out

    def close(self) -> None:
        """Kill everything, and remove the folder."""
        for program in self._programs:
            program.kill()
        orphans = Path(f"/proc/self/task/{os.getpid()}/children")  # those that had left their group
        while orphans.exists() and (pids := orphans.read_text().split()):
            for pid in map(int, pids):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        metrics = [left for port in self._ports for left in Path("/dev/shm").glob(f"kuaishang-*:{port}-*")]
        for folder in (self.folder, *metrics):
            shutil.rmtree(folder, ignore_errors=True)
