"""A network of this run alone: each site has a namespace of its own, which can be cut off from all others.

What runs in site N has the addresses 127.N.0.0/17 and leaves from 127.N.0.1; clients, the name servers of the internet
and WeChat are outside, at 127.9.0.0/16. An address of 127.N.128.0/17 belongs to whichever machine of the site has it.
"""

import ctypes
import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

CLONE_NEWNET = 0x40000000
OUTSIDE = 9
HERE = "KUAISHANG_REHEARSAL"
"""Set in a process that has a network of its own."""
PRIVATE = "mount --make-rprivate / && mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns"
PRIVATE += " && mount -t tmpfs tmpfs /dev/shm && ip link set lo up"


def why_not(programs: Sequence[str] = ()) -> str:
    """Return why this machine cannot have such a network, and these programs in it; empty if it can."""
    missing = [name for name in ("unshare", "ip", "sysctl", *programs) if not shutil.which(name, path=_path())]
    if missing:
        return f"not installed: {', '.join(missing)}"
    done = subprocess.run(["unshare", "--net", "--mount", "sh", "-c", PRIVATE], capture_output=True, text=True)
    return f"it takes root with all its capabilities: {done.stderr.strip()}" if done.returncode else ""


def enter(words: Sequence[str]) -> None:
    """Run `python -m` with these words again, in a network and /dev/shm of its own, unless this process has them."""
    if HERE not in os.environ:
        command = ["unshare", "--net", "--mount", "sh", "-c", f'{PRIVATE} && exec "$@"', "sh", sys.executable, "-m"]
        os.execvpe(command[0], [*command, *words], {**os.environ, HERE: "1", "PATH": _path()})


def _path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


class Network:
    """The machines of these names, each with its site; a machine is a namespace.

    :param machines: the number of the site by the name of a machine.
    """

    def __init__(self, machines: dict[str, int]) -> None:
        self._machines = machines
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        _run("ip link add middle type bridge", "ip link set middle up")
        self._address(OUTSIDE, "middle")
        self._namespaces: dict[str, int] = {}
        for name, site in machines.items():
            _run(f"ip netns add {name}", f"ip link add {name} type veth peer name eth0 netns {name}")
            _run(f"ip link set {name} master middle up")
            self._namespaces[name] = os.open(f"/run/netns/{name}", os.O_RDONLY)
            with self.inside(name):
                self._address(site, "eth0", len([one for one in self._namespaces if machines[one] == site]))

    @staticmethod
    def _address(site: int, device: str, machine: int = 1) -> None:
        """Let 127.0.0.0/8 be addresses as any others: these here, all others behind the device.

        The first machine of a site has all of its addresses but those that move; the next ones have 127.SITE.64.N.
        """
        own = f"127.{site}.0.1" if machine == 1 else f"127.{site}.64.{machine}"
        local = f"127.{site}.0.0/{16 if site == OUTSIDE else 18}" if machine == 1 else f"{own}/32"
        _run(
            *(f"sysctl -qw net.ipv4.conf.{one}.route_localnet=1" for one in ("all", device)),
            "sysctl -qw net.ipv4.ip_nonlocal_bind=1",
            "ip link set lo up",
            "ip addr flush dev lo",
            "ip addr add 127.0.0.1/32 dev lo",
            f"ip link set {device} up",
            # One that stays: with the last address of a device its routes go.
            f"ip addr add {own}/32 dev {device}",
            f"ip route replace local {local} dev lo table local src {own}",
            f"ip route add 127.0.0.0/8 dev {device} src {own}",
        )

    @contextmanager
    def inside(self, machine: str) -> Iterator[None]:
        """Let this thread, and the processes that it starts meanwhile, be in the network of a machine."""
        self._enter(self._namespaces[machine])
        try:
            yield
        finally:
            self._enter(self._home)

    def _enter(self, namespace: int) -> None:
        if self._libc.setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    def place(self, machine: str, server: Any, *names: str) -> None:
        """Let these methods of a server, by default `start`, always run in the network of a machine."""
        for name in names or ("start",):
            setattr(server, name, self._placed(machine, getattr(server, name)))

    def _placed(self, machine: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def there(*arguments: Any, **options: Any) -> Any:
            with self.inside(machine):
                return method(*arguments, **options)

        return there

    def of_site(self, site: int) -> list[str]:
        return [name for name, number in self._machines.items() if number == site]

    def cut(self, site: int) -> None:
        """Let nothing pass between a site and all others: what is sent vanishes, as behind a router that is dead."""
        _run(*(f"ip link set {name} nomaster" for name in self.of_site(site)))

    def heal(self, site: int) -> None:
        _run(*(f"ip link set {name} master middle" for name in self.of_site(site)))

    def reaches(self, machine: str, address: str) -> bool:
        """Whether a machine gets an answer from an address within two seconds, be it that nothing listens there."""
        with self.inside(machine), socket.socket() as probe:
            probe.settimeout(2)
            return probe.connect_ex((address, 1)) == errno.ECONNREFUSED

    def has(self, machine: str, address: str) -> bool:
        """Whether an address that moves is at a machine now."""
        with self.inside(machine):
            shown = subprocess.run(["ip", "addr", "show", "dev", "eth0"], capture_output=True, text=True, check=True)
        return f"inet {address}/" in shown.stdout

    def drop(self, machine: str, address: str) -> None:
        """Take an address that moves from a machine, as when that loses its power."""
        with self.inside(machine):
            subprocess.run(["ip", "addr", "del", f"{address}/32", "dev", "eth0"], capture_output=True)

    def close(self) -> None:
        for name, namespace in self._namespaces.items():
            os.close(namespace)
            _run(f"ip netns del {name}")
        _run("ip link del middle")
        os.close(self._home)


def _run(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.strip()}")
