"""Turns the instances that are alive in etcd into HAProxy's servers, through its runtime socket, beside each HAProxy.

    python3 agent.py

Each second it reads etcd, and sets what differs in HAProxy: a new address gets the first free server whose name begins
with `slot`; one that leaves gets the weight 0, so no new requests; one whose lease has ended is put into maintenance.
Whether a server responds is for HAProxy's own health checks to say.

It would rather leave in what is out than take out what serves:

- While etcd is away nothing is taken out, nor for the length of a lease (`--lease`, 15 s) after it is back, or after
  this program has started: who is alive has registered again by then.
- If nobody is registered as alive, nobody is taken out.
- A server that was never registered is left alone, and so is one that an operator has put into the state `drain`.

`--known` is the file of what it knows, for its next start. `--state` is HAProxy's state file, kept as new as a second:
HAProxy reads it when it starts or reloads, and so begins with these servers also while etcd and this program are away.
A server with an address of its own is in there only while it is out, as in drain.py of deploy/haproxy.
`--metrics` is the address at which Prometheus finds /metrics.
"""

import argparse
import contextlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from etcd import SECONDS, Away, Etcd, is_address, join
from heartbeat import LEAVING, PREFIX, UP

LEFT, LOST = "left", "lost"
"""The lease has ended after the instance had said that it leaves, or without that."""
FORGET_SECONDS = 86400
"""For how long an instance that is out is remembered, and reported if it was lost."""
MAINTENANCE, DRAIN = 0x01, 0x08  # of srv_admin_state: management.txt of HAProxy


@dataclass
class Server:
    """A server of HAProxy's.

    :param out: whether it is in maintenance.
    :param drained: whether an operator has put it into the state `drain`, which `maint` would end.
    """

    backend: str
    name: str
    address: str
    out: bool
    drained: bool
    weight: int


class Haproxy:
    """The runtime socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    def run(self, command: str) -> str:
        """Run a command and return what it prints.

        :raises OSError: if HAProxy does not respond.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS)
            connection.connect(self._path)
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def servers(self) -> tuple[list[Server], str]:
        """Return those of all backends, and HAProxy's state as its state file wants it."""
        state = self.run("show servers state")
        if not state.startswith("1\n#"):
            raise OSError(f"not the state of servers: {state.strip()}")
        version, names, *lines = state.splitlines()
        rows = [dict(zip(names.split()[1:], line.split(), strict=False)) for line in lines if line]
        kept = [" ".join(row.values()) for row in rows if row["srv_admin_state"] != "0" or row["srv_fqdn"] != "-"]
        return [
            Server(
                row["be_name"],
                row["srv_name"],
                join(row["srv_addr"], row["srv_port"]),
                bool(int(row["srv_admin_state"]) & MAINTENANCE),
                bool(int(row["srv_admin_state"]) & DRAIN),
                int(row["srv_uweight"]),
            )
            for row in rows
        ], "\n".join([version, names, *kept, ""])

    def set(self, server: Server, words: str) -> str:
        """Change a server, and return what HAProxy says of it."""
        answer = self.run(f"set server {server.backend}/{server.name} {words}").strip()
        print(f"{server.backend}/{server.name}, {server.address}: {words}{answer and f' ({answer})'}", flush=True)
        return answer


class Registry:
    """What is known of the instances: the state of each address, and since when.

    :param file: keeps it.
    :param lease: seconds.
    """

    def __init__(self, file: Path, lease: float) -> None:
        self._file, self._lease = file, lease
        self._connected: float | None = None
        self.known: dict[str, tuple[str, float]] = {}
        with contextlib.suppress(FileNotFoundError):
            self.known = {address: (state, since) for address, (state, since) in json.loads(file.read_text()).items()}

    def read(self, etcd: Etcd, prefix: str) -> str:
        """Learn from etcd who is alive; return whether that is possible, and if not, why."""
        try:
            listed = etcd.list(prefix)
        except Away as away:
            self._connected = None
            return f"etcd is away, nothing is taken out: {away}"
        now = time.monotonic()
        self._connected = self._connected or now
        for address in filter(is_address, listed):
            self._note(address, LEAVING if listed[address] == LEAVING else UP)
        if now - self._connected >= self._lease:
            for address, (state, since) in list(self.known.items()):
                if address not in listed and state in (UP, LEAVING):
                    self._note(address, LOST if state == UP else LEFT)
                elif state in (LEFT, LOST) and time.time() - since > FORGET_SECONDS:
                    del self.known[address]
        return "etcd responds"

    def _note(self, address: str, state: str) -> None:
        if self.known.get(address, ("",))[0] != state:
            print(f"{address}: {state}", flush=True)
            self.known[address] = state, time.time()
            replace(self._file, json.dumps(self.known))

    def addresses(self, *states: str) -> list[str]:
        return [address for address, (state, _) in self.known.items() if state in states]


def apply(registry: Registry, haproxy: Haproxy, backends: list[str], slots: str) -> int:
    """Set what differs in these backends.

    :param slots: how the names of servers begin that take any address.
    :returns: how many instances found no free slot.
    :raises OSError: if HAProxy does not respond.
    """
    servers, _ = haproxy.servers()
    of_backends = ([server for server in servers if server.backend == backend] for backend in backends)
    return max(_arrange(registry, haproxy, of_one, slots) for of_one in of_backends)


def _arrange(registry: Registry, haproxy: Haproxy, servers: list[Server], slots: str) -> int:
    here = {server.address: server for server in servers}
    alive = registry.addresses(UP)
    free = [one for one in servers if one.name.startswith(slots) and one.out and one.address not in alive]
    without = 0
    for address in alive:
        if address not in here:
            host, _, port = address.rpartition(":")
            if not free or "changed" not in haproxy.set(free[0], f"addr {host.strip('[]')} port {port}"):
                without += 1
                continue
            here[address] = free.pop(0)
        if not here[address].weight:
            haproxy.set(here[address], "weight 100%")
        if here[address].out:
            haproxy.set(here[address], "state ready")
    if alive:
        for address in registry.addresses(LEAVING):
            if address in here and here[address].weight:
                haproxy.set(here[address], "weight 0%")
        for address in registry.addresses(LEFT, LOST):
            if address in here and not (here[address].out or here[address].drained):
                haproxy.set(here[address], "state maint")
    return without


def replace(file: Path, text: str) -> None:
    """Write a file in one step."""
    beside = file.with_name(f"{file.name}.new")
    beside.write_text(text)
    os.replace(beside, file)


def exposition(registry: Registry, etcd_up: bool, haproxy_up: bool, without: int) -> str:
    """Return the metrics as Prometheus reads them."""
    lines = [f"kuaishang_registry_etcd_up {etcd_up:d}", f"kuaishang_registry_haproxy_up {haproxy_up:d}"]
    lines += [f"kuaishang_registry_without_slot {without}"]
    for state in (UP, LEAVING, LOST):
        lines.append(f'kuaishang_registry_instances{{state="{state}"}} {len(registry.addresses(state))}')
    lines += [f'kuaishang_registry_lost{{address="{address}"}} 1' for address in registry.addresses(LOST)]
    return "\n".join([*lines, ""])


class Metrics(http.server.BaseHTTPRequestHandler):
    text = ""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 404)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(self.text.encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--socket", default="/run/haproxy/admin.sock")
    parser.add_argument("--backends", nargs="+", default=["kuaishang", "unready"])
    parser.add_argument("--slots", default="slot", help="how the names of servers begin that take any address")
    parser.add_argument("--known", type=Path, default=Path("/var/lib/kuaishang-registry/instances.json"))
    parser.add_argument("--state", type=Path, default=Path("/var/lib/haproxy/state"))
    parser.add_argument("--prefix", default=PREFIX, help="of the keys in etcd")
    parser.add_argument("--lease", type=float, default=15, help="seconds that a lease lasts")
    parser.add_argument("--metrics", default="127.0.0.1:9402", metavar="HOST:PORT")
    options = parser.parse_args()
    host, _, port = options.metrics.rpartition(":")
    server = http.server.ThreadingHTTPServer((host, int(port)), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    etcd, haproxy = Etcd.from_environment(), Haproxy(options.socket)
    registry = Registry(options.known, options.lease)
    said, without = ("", ""), 0
    while True:
        of_etcd, of_haproxy = registry.read(etcd, options.prefix), "HAProxy responds"
        try:
            without = apply(registry, haproxy, options.backends, options.slots)
            replace(options.state, haproxy.servers()[1])
        except OSError as error:
            of_haproxy = f"HAProxy does not respond: {error}"
        for now, before in zip((of_etcd, of_haproxy), said, strict=True):
            if now != before:
                print(now, flush=True)
        said = of_etcd, of_haproxy
        Metrics.text = exposition(registry, of_etcd == "etcd responds", of_haproxy == "HAProxy responds", without)
        time.sleep(1)


if __name__ == "__main__":
    main()
