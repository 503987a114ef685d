"""Run a command, adopt what outlives its parent below it, as an init does, and end with the last of them.

gdnsd replaces itself by a child, which would belong to nobody. SIGTERM ends all of them.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36


def terminate(*_: object) -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.terminate()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, terminate)
    started = subprocess.Popen(sys.argv[1:])
    with suppress(ChildProcessError):
        while True:
            os.wait()
