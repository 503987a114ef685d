"""Redis with two replicas and three sentinels, each a process, with the configuration of deploy/redis."""

import re
import socket
import subprocess
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from dev.redis_server import executable
from tests.deploy.partition import cut, heal
from tests.harness import ROOT, WAIT_SECONDS, Program, free_port, wait_until

CONFIGURATION = ROOT / "deploy" / "redis"
ADDRESSES = "127.1.0.21", "127.1.0.22", "127.1.0.23"
SERVICE = "kuaishang"
PASSWORDS = {
    "SERVICE-PASSWORD": "a-redis-password-nobody-may-see",
    "REPLICA-PASSWORD": "a-replica-password-nobody-may-see",
    "SENTINEL-PASSWORD": "a-sentinel-password-nobody-may-see",
    "SENTINELS-PASSWORD": "a-password-of-sentinels-nobody-may-see",
}
ADMINISTRATOR = "an-administrators-password-nobody-may-see"


def is_bindable(address: str) -> bool:
    """Whether this machine has the address; only Linux has all of 127.0.0.0/8."""
    with suppress(OSError), closing(socket.socket()) as free:
        free.bind((address, 0))
        return True
    return False


class RedisProcess(Program):
    """A redis-server or a sentinel, with a configuration of its own, which it changes.

    :param folder: for its files.
    :param name: `redis` or `sentinel`.
    :param lines: of its configuration, shipped ones replaced and others added.
    """

    def __init__(self, folder: Path, name: str, address: str, lines: dict[str, str]) -> None:
        self.folder, self.name, self.address, self.port = folder, name, address, free_port(address)
        folder.mkdir(parents=True, exist_ok=True)
        lines = {"bind": address, "port": str(self.port), "dir": str(folder), "logfile": f"{name}.log", **lines}
        text = (CONFIGURATION / f"{name}.conf").read_text()
        for word, password in PASSWORDS.items():
            text = re.sub(rf"(?<=[ >]){word}\b", password, text)
        for option, value in lines.items():
            text, found = re.subn(rf"(?m)^{option} .*", f"{option} {value}", text)
            text += "" if found else f"{option} {value}\n"
        self.configuration = folder / f"{name}.conf"
        self.configuration.write_text(text)

        words = [executable(), str(self.configuration), *(["--sentinel"] if name == "sentinel" else [])]
        super().__init__(folder / f"{name}.output", words, starts=False)

    def start(self) -> None:
        """Start it, with what it has written before, and wait until it accepts connections."""
        super().start()
        wait_until(lambda: self._accepts() or not self.running())
        assert self.running(), self.configuration

    def _accepts(self) -> bool:
        with suppress(OSError), socket.create_connection((self.address, self.port), timeout=WAIT_SECONDS):
            return True
        return False

    def client(self, **options: Any) -> Redis:
        """Return a client with all rights."""
        user = ("default", PASSWORDS["SENTINELS-PASSWORD"]) if self.name == "sentinel" else ("admin", ADMINISTRATOR)
        options = {
            "username": user[0],
            "password": user[1],
            "socket_timeout": 5,
            "retry": Retry(NoBackoff(), 0),
            **options,
        }
        return Redis(self.address, self.port, **options)


class RedisSentinels:
    """Three machines by their addresses, each with a redis-server and a sentinel. The first begins as the primary.

    :param folder: for the files of all.
    :param addresses: of the machines, on which the ports are found.
    """

    def __init__(self, folder: Path, addresses: Sequence[str] = ADDRESSES) -> None:
        # From Redis 7 on a connection leaves from this address, too, only if it is told to; before, always.
        version = subprocess.run([executable(), "--version"], capture_output=True, text=True, check=True).stdout
        source = {} if " v=6" in version else {"bind-source-addr": "ADDRESS"}
        self.servers: list[RedisProcess] = []
        self.sentinels: list[RedisProcess] = []
        for number, address in enumerate(addresses):
            lines = dict.fromkeys(source, address) | {"user admin": f"on >{ADMINISTRATOR} ~* &* +@all"}
            if self.servers:
                lines["replicaof"] = f"{addresses[0]} {self.servers[0].port}"
            self.servers.append(RedisProcess(folder / f"redis-{number}", "redis", address, lines))
        for number, address in enumerate(addresses):
            monitor = f"{SERVICE} {addresses[0]} {self.servers[0].port} 2"
            lines = dict.fromkeys(source, address) | {"sentinel monitor": monitor}
            self.sentinels.append(RedisProcess(folder / f"sentinel-{number}", "sentinel", address, lines))

    @property
    def url(self) -> str:
        """REDIS_URL."""
        hosts = ",".join(f"{sentinel.address}:{sentinel.port}" for sentinel in self.sentinels)
        credentials = f"kuaishang:{PASSWORDS['SERVICE-PASSWORD']}"
        return f"redis+sentinel://{credentials}@{hosts}/{SERVICE}/0?sentinel_password={PASSWORDS['SENTINELS-PASSWORD']}"

    def start(self) -> None:
        """Start all, and wait until the sentinels know each other and both replicas follow."""
        heal()
        for process in (*self.servers, *self.sentinels):
            process.start()
        wait_until(self.complete)

    def complete(self) -> bool:
        """Whether all sentinels know each other and the same primary, and both replicas follow it."""
        known = [self.known_by(sentinel) for sentinel in self.sentinels]
        if len({(one.get("ip"), one.get("port")) for one in known}) != 1:
            return False
        if any((one.get("num-other-sentinels"), one.get("num-slaves")) != (2, 2) for one in known):
            return False
        with suppress(RedisError), self.primary().client() as client:
            role: Any = client.execute_command("ROLE")
            return role[0] == b"master" and len(role[2]) == 2
        return False

    @staticmethod
    def known_by(sentinel: RedisProcess) -> dict[str, Any]:
        """Return what a sentinel knows of the primary; nothing if it does not respond."""
        with suppress(RedisError), sentinel.client(socket_timeout=1) as client:
            return client.sentinel_master(SERVICE)
        return {}

    def primary(self) -> RedisProcess:
        """Return the primary by the newest that a sentinel knows."""
        newest = max(filter(None, map(self.known_by, self.sentinels)), key=lambda one: int(one["config-epoch"]))
        return next(one for one in self.servers if (one.address, one.port) == (newest["ip"], newest["port"]))

    def cut(self, machine: RedisProcess) -> None:
        """Let nothing pass any more between this machine and the two others; clients reach it as before."""
        others = {one.address for one in self.servers} - {machine.address}
        to_others = [("-s", machine.address, "-d", one) for one in others]
        cut([*to_others, *(("-s", one, "-d", machine.address) for one in others)])

    def heal(self) -> None:
        """Let all pass again."""
        heal()

    def close(self) -> None:
        self.heal()
        for process in (*self.sentinels, *self.servers):
            process.kill()
