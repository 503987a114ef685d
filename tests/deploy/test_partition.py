"""What a killed run has cut is whole again for the next one."""

import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress

import pytest

from dev.run import listen
from tests.deploy.partition import can_cut, cut, heal
from tests.harness import ROOT, wait_until

pytestmark = pytest.mark.skipif(not can_cut(), reason="needs root and iptables")

RULE = ["-s", "127.1.0.77", "-d", "127.1.0.78"]
KILLED = f"""
import os, signal
from tests.deploy.partition import cut
cut([{RULE}])
os.kill(os.getpid(), signal.SIGKILL)
"""


def passes() -> bool:
    with closing(listen("a port", "0", "127.1.0.78")) as listener:
        host, port = listener.getsockname()
        with suppress(TimeoutError), closing(socket.create_connection((host, port), 1, ("127.1.0.77", 0))):
            return True
    return False


def test_a_cut_ends() -> None:
    assert passes()
    cut([RULE])
    try:
        assert not passes()
    finally:
        heal()
    assert passes()


def test_what_a_killed_run_has_cut_is_healed() -> None:

    def cut_by_killed() -> bool:
        killed = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL
        return not passes()

    try:
        wait_until(cut_by_killed)  # others that test at the same time may heal it before we look
    finally:
        heal()
    assert passes()
