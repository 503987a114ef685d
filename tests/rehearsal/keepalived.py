"""keepalived with the configuration as shipped in deploy/haproxy."""

import shutil
import subprocess
from pathlib import Path

from tests.deploy.load_balancers import PATH
from tests.harness import ROOT, WAIT_SECONDS, bound_to_this_process

KEEPALIVED = shutil.which("keepalived", path=PATH)


class Keepalived:
    """One of two that share an address; it runs when the constructor returns.

    :param own: the address of its machine, where its HAProxy listens.
    :param other: that of the other one.
    :param shared: the address that one of them has.
    """

    def __init__(self, folder: Path, own: str, other: str, shared: str) -> None:
        folder.mkdir()
        self.folder = folder
        text = (ROOT / "deploy" / "haproxy" / "keepalived.conf").read_text()
        here = {"10.0.0.10": own, "10.0.0.11": other, "10.0.0.9": shared, "script_user nobody": "script_user root"}
        for shipped, ours in here.items():
            assert shipped in text, shipped
            text = text.replace(shipped, ours)
        (folder / "keepalived.conf").write_text(text)
        self.start()

    def start(self) -> None:
        words = ["--dont-fork", "--log-console", "--vrrp", "--use-file", str(self.folder / "keepalived.conf")]
        pids = ["--pid", str(self.folder / "pid"), "--vrrp_pid", str(self.folder / "vrrp.pid")]
        with (self.folder / "log").open("ab") as log:
            command = [*bound_to_this_process(), str(KEEPALIVED), *words, *pids]
            self.process = subprocess.Popen(command, env={"PATH": PATH}, stdout=log, stderr=log)

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End it as a crash of the machine would; the address stays with the machine."""
        self.process.kill()
        self.process.wait(WAIT_SECONDS)
