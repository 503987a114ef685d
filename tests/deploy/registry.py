"""etcd, and the programs of deploy/registry, each in a process of its own."""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from tests.deploy.load_balancers import HAProxy
from tests.harness import ROOT, WAIT_SECONDS, Program, free_port, wait_until

ETCD = shutil.which("etcd")
FOLDER = ROOT / "deploy" / "registry"


class Etcd(Program):
    """A member of an etcd cluster, by default its only one.

    :param folder: of its data, which a restart finds again.
    :param address: a loopback address, such as its site's.
    :param cluster: the URLs of the members for each other, by their names; see `etcd_cluster`.
    """

    def __init__(
        self, folder: Path, address: str = "127.0.0.1", name: str = "one", cluster: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.data = folder / "data"
        self.endpoint = f"http://{address}:{free_port(address)}"
        cluster = cluster or {name: peer_url(address)}
        words = ["--name", name, "--data-dir", str(self.data), "--log-level", "warn", "--logger", "zap"]
        words += ["--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint]
        words += ["--listen-peer-urls", cluster[name], "--initial-advertise-peer-urls", cluster[name]]
        words += ["--initial-cluster", ",".join(f"{one}={url}" for one, url in cluster.items())]
        super().__init__(folder / "log", [str(ETCD), *words])

    def wait(self) -> None:
        """Wait until it answers, with a majority of its members."""
        wait_until(self.is_healthy)

    def is_healthy(self) -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{self.endpoint}/health", timeout=2).json()["health"] == "true"
        return False

    def forget(self) -> None:
        """Remove the data of a member that does not run."""
        shutil.rmtree(self.data)


def peer_url(address: str) -> str:
    return f"http://{address}:{free_port(address)}"


def etcd_cluster(folder: Path, addresses: Sequence[str]) -> list[Etcd]:
    """Start a member at each of these addresses, and wait until they are one cluster."""
    cluster = {f"etcd-{number}": peer_url(address) for number, address in enumerate(addresses)}
    members = [Etcd(folder / name, address, name, cluster) for name, address in zip(cluster, addresses, strict=True)]
    for member in members:
        member.wait()
    return members


def _environment(etcds: Sequence[Etcd]) -> dict[str, str]:
    return {"ETCDCTL_ENDPOINTS": ",".join(etcd.endpoint for etcd in etcds)}


class Heartbeat(Program):
    """Registers an instance.

    :param instance: its IP address and port.
    :param seconds: between two beats: the lease lasts three times that.
    """

    def __init__(self, folder: Path, etcds: Sequence[Etcd], instance: str, seconds: int = 5, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(FOLDER / "heartbeat.py"), instance, "--seconds", str(seconds), *more]
        super().__init__(folder / "log", words, _environment(etcds))


class SlottedHAProxy(HAProxy):
    """HAProxy with the slots of deploy/registry/README.md in place of servers with addresses."""

    def __init__(self, folder: Path, **more: Any) -> None:
        super().__init__(folder, {"here": "127.0.0.1:1"}, **more)

    def configure(self, servers: Mapping[str, str], different: Mapping[str, str]) -> None:
        super().configure(servers, different)
        configuration = self.folder / "haproxy.cfg"
        text = configuration.read_text()
        slots = re.findall(r"^    server-template .*$", (FOLDER / "README.md").read_text(), re.MULTILINE)
        fixed = re.findall(r"^    server here .*$", text, re.MULTILINE)
        for one, other in zip(fixed, slots, strict=True):
            text = text.replace(f"{one}\n", f"{other}\n", 1)
        configuration.write_text(text)

    def slots(self, of: str = "kuaishang") -> dict[str, str]:
        """Return the status of each slot of a backend that has an address, or `leaving`."""
        rows = self.statistics()
        return {
            name: "leaving" if row["weight"] == "0" and row["status"] == "UP" else row["status"]
            for (backend, name), row in rows.items()
            if backend == of and name.startswith("slot") and row["addr"] != "127.0.0.1:1"
        }


class Agent(Program):
    """Keeps the servers of a HAProxy.

    :param seconds: between two beats of the instances.
    """

    def __init__(self, folder: Path, etcds: Sequence[Etcd], haproxy: HAProxy, seconds: int = 5, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{free_port('127.0.0.1')}/metrics"
        words = [sys.executable, str(FOLDER / "agent.py"), "--socket", haproxy.socket, "--state", str(haproxy.state)]
        words += ["--known", str(folder / "instances.json"), "--lease", str(3 * seconds)]
        super().__init__(folder / "log", [*words, "--metrics", self.url.split("/")[2], *more], _environment(etcds))

    def metrics(self) -> dict[str, float]:
        lines: Any = (line.rsplit(" ", 1) for line in requests.get(self.url, timeout=WAIT_SECONDS).text.splitlines())
        return {name: float(value) for name, value in lines}
