"""Five MariaDB servers in three sites, with deploy/galera/galera.cnf, each at an address of its own of this machine.

Debian's galera-4, mariadb-backup and socat are needed; to cut a site off, root and iptables.
"""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pymysql

from tests.databases import MariaDB, _empty_data, executable
from tests.deploy.load_balancers import HAPROXY, RuntimeSocket
from tests.deploy.partition import cut, heal
from tests.harness import ROOT, Program, bound_to_this_process, free_port, migrate, suspend, wait_until

CONFIGURATION = ROOT / "deploy" / "galera" / "galera.cnf"
README = CONFIGURATION.with_name("README.md")
PROVIDER = Path("/usr/lib/galera/libgalera_smm.so")
COPY = ("mariadb-backup", "mbstream", "socat")
"""What the script of `wsrep_sst_method` runs."""
ADDRESSES = ("127.1.0.1", "127.1.0.2", "127.2.0.1", "127.2.0.2", "127.3.0.1")
DATABASE, USER, PASSWORD = "kuaishang", "app", "app-password"
SMALL = {"innodb_buffer_pool_size": "48M", "innodb_log_file_size": "8M", "performance_schema": "OFF"}
"""Of a test's servers. A commit must survive a killed server, not the machine: nothing waits for the disk."""
SMALL |= {"innodb_flush_method": "nosync", "skip_name_resolve": "ON"}


def is_installed() -> bool:
    """Whether this machine can run a cluster."""
    with suppress(FileNotFoundError):
        return bool(executable("mariadbd") and PROVIDER.exists() and all(map(shutil.which, COPY)))
    return False


def documented(command: str) -> str:
    """Return what deploy/galera/README.md says to type.

    :param command: a pattern of a line, whose first group is returned.
    """
    found = re.search(f"(?m)^    {command}$", README.read_text())
    assert found, command
    return found[1]


def _as_mysql() -> list[str]:
    """Words before a server's command: it refuses to run as root."""
    user = ["--reuid=mysql", "--regid=mysql", "--clear-groups"] if os.geteuid() == 0 else []
    return [*bound_to_this_process(), *user]


def _user() -> str:
    """The user of the machine who runs the servers."""
    return "mysql" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


class Node(MariaDB):
    """One server of a cluster; `start` does not wait until it is a member.

    :param options: further options of the server.
    """

    def __init__(self, folder: Path, number: int, ports: dict[str, int], *options: str) -> None:
        super().__init__(folder, *options)
        self.address, self.site, self.port = ADDRESSES[number], number // 2 + 1, ports["client"]
        self.name = f"n{number + 1}"
        self._ports = ports | {"copy": free_port()}  # where socat listens on all addresses
        self.log, self._log_start = folder / "mariadb.log", 0

    def _words(self, *more: str) -> list[str]:
        """Write its configuration, and return the words of its command."""
        group = self._ports["group"]
        text = CONFIGURATION.read_text()
        for shipped, here in {
            " = 10.1.0.1\n": f" = {self.address}\n",
            "segment=1": f"segment={self.site}",
            "tcp://10.1.0.1:4567": f"tcp://{self.address}:{group}; ist.recv_addr={self.address}:{self._ports['state']}",
            "gcache.size=512M": "gcache.size=32M",
            'wsrep_sst_auth = "mysql:"': f'wsrep_sst_auth = "{_user()}:"',
        }.items():
            assert shipped in text
            text = text.replace(shipped, here)
        options = {
            **SMALL,
            "datadir": self.folder / "data",
            "tmpdir": self.folder / "tmp",
            "socket": self.socket,
            "port": self.port,
            "log_error": self.log,
            "wsrep_cluster_address": "gcomm://" + ",".join(f"{address}:{group}" for address in ADDRESSES),
            "wsrep_node_address": f"{self.address}:{group}",
            "wsrep_node_name": self.name,
            "wsrep_sst_receive_address": f"{self.address}:{self._ports['copy']}",
        }
        text += "\n" + "".join(f"{name} = {value}\n" for name, value in options.items())
        configured = self.folder / "galera.cnf"
        configured.write_text(text)
        return [*_as_mysql(), executable("mariadbd"), f"--defaults-file={configured}", *self._options, *more]

    def start(self, *, new_cluster: bool = False) -> None:
        """Start the server with the data it has, as systemd's unit does.

        :param new_cluster: found the cluster; as `galera_new_cluster`.
        """
        temporary = self.folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "data").exists():
            shutil.copytree(_empty_data(), self.folder / "data")
        if os.geteuid() == 0:
            subprocess.run(["chown", "-R", "mysql:", self.folder, Path(self.socket).parent], check=True)
        env = {**os.environ, "TMPDIR": str(temporary)}
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        words = self._words(f"--wsrep-start-position={self.recover(env)}", *["--wsrep-new-cluster"] * new_cluster)
        self.process = subprocess.Popen(
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def recover(self, env: dict[str, str] | None = None) -> str:
        """Return the id and number of the last transaction on its disk, as `galera_recovery` does."""
        if not (self.folder / "data" / "grastate.dat").exists():
            return "00000000-0000-0000-0000-000000000000:-1"
        done = subprocess.run(
            self._words("--wsrep-recover", "--disable-log-error"),
            env=env,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        found = re.search(r"WSREP: Recovered position: (\S+)", done.stderr)
        assert found, done.stderr
        return found[1]

    def status(self, name: str) -> str:
        """Return a status variable; empty if the server does not respond."""
        with suppress(pymysql.Error, OSError):
            return str(self.execute(f"SHOW STATUS LIKE '{name}'")[1])
        return ""

    def execute(self, statement: str) -> Any:
        """Run a statement as an administrator, and return the first row of its result, if any.

        :raises pymysql.err.OperationalError: if there is no answer in some seconds.
        """
        return self.execute_all(statement)

    def execute_all(self, *statements: str) -> Any:
        """The same for several of one session; returns the first row of the last one."""
        if not self._listens():
            raise pymysql.err.OperationalError(2003, f"{self.name} is down")
        # Without waiting for other nodes.
        options = {"autocommit": True, "init_command": "SET wsrep_sync_wait = 0", "read_timeout": 30}
        connection = pymysql.connect(unix_socket=self.socket, user="root", **options)
        with connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchone()

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def is_synced(self) -> bool:
        """Whether it takes reads and writes."""
        return self.status("wsrep_local_state") == "4" and self.status("wsrep_ready") == "ON"

    def is_waiting(self) -> bool:
        """Whether it looks for the other members of the last cluster, since its last start."""
        return self.running() and not self._listens() and "Non-primary view" in self.log.read_text()[self._log_start :]

    def suspend(self) -> None:
        """Make it hang."""
        assert self.process
        suspend(self.process)

    def resume(self) -> None:
        assert self.process
        psutil.Process(self.process.pid).resume()

    def do(self, line: str) -> None:
        """Run a line of deploy/galera/README.md, with the data of this node."""
        assert "/var/lib/mysql/" in line
        subprocess.run(line.replace("/var/lib/mysql", str(self.folder / "data")), shell=True, check=True)

    def bootstrap(self) -> None:
        """Let what is left of the cluster take writes again: the command of deploy/galera/README.md."""
        self.execute(documented(r'mariadb -e "(SET GLOBAL .*pc\.bootstrap.*)"'))

    @property
    def last_committed(self) -> int:
        return int(self.status("wsrep_last_committed") or -1)


class Galera:
    """Five nodes in three sites, 2 + 2 + 1.

    :param options: further options of the servers.
    :param size: fewer nodes, the first ones.
    """

    def __init__(self, folder: Path, *options: str, size: int = len(ADDRESSES)) -> None:
        ports = {name: free_port() for name in ("client", "group", "state")}
        self.nodes = [Node(folder / f"n{number + 1}", number, ports, *options) for number in range(size)]

    def start(self) -> None:
        """Found the cluster, and wait until all nodes are members."""
        heal()
        first, *others = self.nodes
        first.start(new_cluster=True)
        self.wait_for([first], 1)
        first.execute(f"CREATE USER {_user()}@localhost IDENTIFIED VIA unix_socket")
        first.execute(f"GRANT RELOAD, PROCESS, LOCK TABLES, BINLOG MONITOR ON *.* TO {_user()}@localhost")
        first.stop()
        for node in others:  # begins where the first one is, or would need a copy of all from it, one after the other
            shutil.copytree(first.folder / "data", node.folder / "data")
        first.start(new_cluster=True)
        self.wait_for([first], 1)
        self.join(others)

    def join(self, nodes: Iterable[Node]) -> None:
        """Start nodes and wait until they are members: one after the other, as two at once may fail to become one."""
        for node in nodes:
            node.start()
            self._become_member(node)

    @staticmethod
    def _become_member(node: Node) -> None:
        """Wait until a node is a member; if it ends, start it again, as deploy/galera/restart.conf does."""

        def is_member() -> bool:
            if not node.running():
                node.start()
            return node.is_synced()

        wait_until(is_member, 90)

    def restart(self) -> None:
        """Start all nodes after all were killed: when the members of the last cluster are back, they form it again."""
        for node in self.nodes:
            node.start()
        self.wait_for(self.nodes, len(self.nodes))

    def wait_for(self, nodes: Sequence[Node], size: int, seconds: float = 60) -> None:
        """Wait until these nodes take writes in a cluster of this size."""
        wait_until(
            lambda: all(node.status("wsrep_cluster_size") == str(size) and node.is_synced() for node in nodes), seconds
        )

    def site(self, number: int) -> list[Node]:
        """Return the nodes of a site: 1, 2 or 3."""
        return [node for node in self.nodes if node.site == number]

    def kill(self, nodes: Iterable[Node]) -> None:
        """Kill nodes at once, as the loss of their machines would."""
        nodes = list(nodes)
        for node in nodes:
            assert node.process
            node.process.kill()
        for node in nodes:
            node.kill()

    def create(self) -> str:
        """Create and migrate the service's database, and return its URL at the first node."""
        node = self.nodes[0]
        node.execute(f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4")
        node.execute(f"CREATE USER {USER}@'127.%' IDENTIFIED BY '{PASSWORD}'")
        node.execute(f"GRANT ALL ON {DATABASE}.* TO {USER}@'127.%'")
        node.execute("CREATE USER haproxy@'127.%'")
        url = self.url(node.address, node.port)
        migrate(url)
        return url

    @staticmethod
    def url(host: str, port: int) -> str:
        return f"mysql://{USER}:{PASSWORD}@{host}:{port}/{DATABASE}"

    @staticmethod
    @contextmanager
    def cut(site: int) -> Iterator[None]:
        """Let nothing pass between the addresses of a site and all others, in either direction, during the block."""
        here = f"127.{site}.0.0/16"
        cut((("-i", "lo", "-s", here, "!", "-d", here), ("-i", "lo", "!", "-s", here, "-d", here)))
        try:
            yield
        finally:
            heal()

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
            node.close()


class Writer(Program, RuntimeSocket):
    """HAProxy with deploy/galera/haproxy.cfg in front of a cluster.

    :param name: that it has among its peers.
    :param peers: the addresses of all who agree on the writer, as host:port, by name; itself alone by default.
    :param several: whether to write to all nodes in turn, which is not how it is shipped.
    """

    def __init__(
        self,
        folder: Path,
        galera: Galera,
        host: str = "127.0.0.1",
        name: str = "site-1",
        peers: Mapping[str, str] | None = None,
        several: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = galera.url(host, self.port)
        self._short = tempfile.TemporaryDirectory(prefix="kuaishang-")
        self.socket = f"{self._short.name}/admin.sock"
        peers = peers or {name: f"{host}:{free_port()}"}
        text = CONFIGURATION.with_name("haproxy.cfg").read_text()
        text = text.replace("bind 127.0.0.1:3306", f"bind {host}:{self.port}")
        statistics = f"{host}:{free_port()}"
        self.statistics_url = f"http://{statistics}"
        text = text.replace("bind 127.0.0.1:8405", f"bind {statistics}")
        text = re.sub("(?:    peer .*\n)+", "".join(f"    peer {one} {where}\n" for one, where in peers.items()), text)
        at = {node.name: f"{node.address}:{node.port}" for node in galera.nodes}
        text, count = re.subn(r"server (n\d) [0-9.]+:3306", lambda found: f"server {found[1]} {at.get(found[1])}", text)
        assert count == len(ADDRESSES)
        text = re.sub(r"    server n\d None.*\n", "", text)
        if several:
            text = text.replace(" backup\n", "\n").replace("stick on int(1)", "balance roundrobin")
        head = f"global\n    log stdout format raw daemon\n    stats socket {self.socket} level admin\n\n"
        (folder / "haproxy.cfg").write_text(head + text)
        super().__init__(folder / "log", [str(HAPROXY), "-db", "-L", name, "-f", str(folder / "haproxy.cfg")])

    def start(self) -> None:
        super().start()
        wait_until(lambda: Path(self.socket).exists() or not self.running())
        assert self.running(), self.log()

    def states(self) -> dict[str, str]:
        """Return what the checks of each node say, by name: UP, DOWN, UP 1/2 and so on."""
        return {name: row["status"] for name, row in self._nodes().items()}

    def writer(self) -> str | None:
        """Return the name of the node that gets new connections; None if there is none."""
        found = re.search(r"server_id=(\d+)", self.ask("show table database"))
        return f"n{found[1]}" if found else None

    def sessions(self) -> dict[str, int]:
        """Return the number of open connections to each node, by name."""
        return {name: int(row["scur"]) for name, row in self._nodes().items()}

    def _nodes(self) -> dict[str, dict[str, str]]:
        rows = self.statistics()
        return {name: row for (proxy, name), row in rows.items() if proxy == "database" and name.startswith("n")}

    def close(self) -> None:
        self.kill()
        self._short.cleanup()
