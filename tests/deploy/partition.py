"""Cuts the network between addresses of this machine, by rules of iptables in a chain of this process.

A run that is killed leaves its chain; the next one removes it.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence

import psutil

CHAIN = "KUAISHANG-"
"""And the id of the process."""


def can_cut() -> bool:
    """Whether this process may; it takes root."""
    return shutil.which("iptables") is not None and not _iptables("-S", "INPUT").returncode


def cut(rules: Iterable[Sequence[str]]) -> None:
    """Drop all that matches one of these rules, each the words of iptables before the target, until `heal`."""
    chain = f"{CHAIN}{os.getpid()}"
    added = [["-A", chain, *rule, "-j", "DROP"] for rule in rules]
    for words in (["-N", chain], *added, ["-I", "INPUT", "-j", chain]):
        _iptables(*words).check_returncode()


def heal() -> None:
    """Let all pass again that this process has cut, or one that was killed before it did this."""
    if not can_cut():
        return
    for process in map(int, re.findall(rf"(?m)^-N {CHAIN}(\d+)$", _iptables("-S").stdout)):
        if process == os.getpid() or not psutil.pid_exists(process):
            for words in (["-D", "INPUT", "-j"], ["-F"], ["-X"]):
                _iptables(*words, f"{CHAIN}{process}")


def _iptables(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["iptables", "-w", *words], capture_output=True, text=True)
