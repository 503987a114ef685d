"""keepalived with the configuration as shipped in deploy/haproxy."""

import shutil
from pathlib import Path

from tests.deploy.load_balancers import PATH
from tests.harness import ROOT, Program

KEEPALIVED = shutil.which("keepalived", path=PATH)


class Keepalived(Program):
    """One of two that share an address; one that is killed leaves it with its machine.

    :param own: the address of its machine, where its HAProxy listens.
    :param other: that of the other one.
    :param shared: the address that one of them has.
    """

    def __init__(self, folder: Path, own: str, other: str, shared: str) -> None:
        folder.mkdir()
        text = (ROOT / "deploy" / "haproxy" / "keepalived.conf").read_text()
        here = {"10.0.0.10": own, "10.0.0.11": other, "10.0.0.9": shared, "script_user nobody": "script_user root"}
        here["http://127.0.0.1/"] = f"http://{own}/"
        for shipped, ours in here.items():
            assert shipped in text, shipped
            text = text.replace(shipped, ours)
        (folder / "keepalived.conf").write_text(text)
        words = ["--dont-fork", "--log-console", "--vrrp", "--use-file", str(folder / "keepalived.conf")]
        pids = ["--pid", str(folder / "pid"), "--vrrp_pid", str(folder / "vrrp.pid")]
        super().__init__(folder / "log", [str(KEEPALIVED), *words, *pids], {"PATH": PATH})
