"""What systemd itself says of a unit, without starting it."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def verify(*units: Path, ours: str) -> None:
    """Let systemd accept units.

    :param ours: what their messages would name; it warns of other units of this machine, too.
    """
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ours not in done.stderr
