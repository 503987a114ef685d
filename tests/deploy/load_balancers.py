"""HAProxy and nginx with the configuration as shipped in deploy/, each in processes of its own.

`.ci/run` installs Debian's haproxy and nginx-light.
"""

import csv
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import requests

from dev.run import listen
from tests.harness import ROOT, WAIT_SECONDS, bound_to_this_process, suspend, wait_until

PATH = f"{os.environ['PATH']}:/usr/sbin"
HAPROXY, NGINX = shutil.which("haproxy", path=PATH), shutil.which("nginx", path=PATH)


def free_port(host: str) -> int:
    with closing(listen("a port", "0", host)) as listener:
        return int(listener.getsockname()[1])


class LoadBalancer(ABC):
    """A proxy in front of instances, with a certificate for its address. It runs when the constructor returns.

    :param folder: for its files.
    :param servers: the addresses of the instances, as host:port, by name.
    :param host: the address that it listens on.
    :param plain_port: that leads to TLS; free ones by default.
    :param different: texts of the configuration, each there at least once, and what stands in their place here.
    """

    command: list[str]
    process: subprocess.Popen[bytes]

    def __init__(
        self,
        folder: Path,
        servers: Mapping[str, str],
        host: str = "127.0.0.1",
        plain_port: int = 0,
        port: int = 0,
        different: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.host = folder, host
        self.plain_port, self.port = plain_port or free_port(host), port or free_port(host)
        self.plain_url, self.url = f"http://{host}:{self.plain_port}", f"https://{host}:{self.port}"
        self.certificate, self.key = folder / "certificate", folder / "key"
        subject = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=IP:{host}"]
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
        subprocess.run(
            [*made, "-days", "1", "-keyout", self.key, "-out", self.certificate], check=True, capture_output=True
        )
        self.log, self.errors = folder / "access", folder / "errors"
        self.configure(servers, different or {})
        self.start()

    @abstractmethod
    def configure(self, servers: Mapping[str, str], different: Mapping[str, str]) -> None:
        """Write the configuration; `start` and `reload` read it."""

    @abstractmethod
    def reload(self) -> None:
        """Let new processes serve, with the configuration as it is now; the old ones finish their requests."""

    def start(self) -> None:
        with self.log.open("ab") as output, self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*bound_to_this_process(), *self.command], stdin=subprocess.DEVNULL, stdout=output, stderr=errors
            )
        wait_until(lambda: self.accepts() or self.process.poll() is not None)
        assert self.process.poll() is None, self.errors.read_text()

    def accepts(self) -> bool:
        with suppress(OSError), socket.create_connection((self.host, self.port), timeout=WAIT_SECONDS):
            return True
        return False

    def family(self) -> list[psutil.Process]:
        """Return the master, and then the processes that serve."""
        master = psutil.Process(self.process.pid)
        return [master, *master.children(recursive=True)]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(WAIT_SECONDS)

    def kill(self) -> None:
        """End all its processes, as a crash of the machine would."""
        if self.process.poll() is None:
            family = self.family()
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            self.process.wait()
            psutil.wait_procs(family)

    def discard(self) -> None:
        """End it for good."""
        self.kill()

    def suspend(self) -> None:
        for one in self.family():
            suspend(one)

    def resume(self) -> None:
        for one in self.family():
            one.resume()

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(method, self.url + path, verify=str(self.certificate), timeout=WAIT_SECONDS, **options)

    def send(self, *lines: str, plain: bool = False) -> tuple[HTTPResponse, bytes]:
        """Send these lines as they are, and return the response and its body.

        :param plain: whether to send them without TLS, to the port that wants it.
        """
        with self.connect(plain) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            response = HTTPResponse(connection)
            response.begin()
            return response, response.read()

    def connect(self, plain: bool = False) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=WAIT_SECONDS)
        if plain:
            return connection
        context = ssl.create_default_context(cafile=self.certificate)
        return context.wrap_socket(connection, server_hostname=self.host)


class HAProxy(LoadBalancer):
    """HAProxy with deploy/haproxy/haproxy.cfg, steered by its runtime socket.

    :param statistics_port: that Prometheus scrapes.
    """

    def __init__(
        self, folder: Path, servers: Mapping[str, str], *args: Any, statistics_port: int = 0, **more: Any
    ) -> None:
        # The path of a socket has at most about 100 characters.
        self._short = tempfile.TemporaryDirectory(prefix="kuaishang-")
        self.socket = f"{self._short.name}/admin.sock"
        self.state = folder / "state"
        self._statistics_port = statistics_port
        super().__init__(folder, servers, **more)

    def configure(self, servers: Mapping[str, str], different: Mapping[str, str]) -> None:
        port = self._statistics_port = self._statistics_port or free_port(self.host)
        self.statistics_url = f"http://{self.host}:{port}"
        pem = self.folder / "kuaishang.pem"
        pem.write_bytes(self.certificate.read_bytes() + self.key.read_bytes())
        self.state.write_text("1\n")
        here = {
            "/run/haproxy/admin.sock": self.socket,
            "/var/lib/haproxy/state": str(self.state),
            "/var/lib/haproxy": self._short.name,
            "bind :80\n": f"bind {self.host}:{self.plain_port}\n",
            "bind :443 ": f"bind {self.host}:{self.port} ",
            "/etc/haproxy/kuaishang.pem": str(pem),
            "bind 127.0.0.1:8404": f"bind {self.host}:{port}",
            **different,
        }
        if os.getuid():
            here |= {"    user haproxy\n": "", "    group haproxy\n": "", f"    chroot {self._short.name}\n": ""}
        else:
            here |= {"user haproxy\n": "user root\n", "group haproxy\n": "group root\n"}
        text = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
        for shipped, other in here.items():
            assert shipped in text, shipped
            text = text.replace(shipped, other)
        for more in (" check", ""):
            lines = "".join(f"    server {name} {address}{more}\n" for name, address in servers.items())
            text, count = re.subn(rf"(?:    server \S+ \S+{more}\n)+", lines, text, count=1)
            assert count == 1
            text = text.replace(lines, lines.replace("    server", "    SERVER"), 1)
        configuration = self.folder / "haproxy.cfg"
        configuration.write_text(text.replace("    SERVER", "    server"))
        self.command = [str(HAPROXY), "-Ws", "-f", str(configuration)]

    def ask(self, command: str) -> str:
        """Send a command to the runtime socket, and return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_SECONDS)
            connection.connect(self.socket)
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def statistics(self) -> dict[tuple[str, str], dict[str, str]]:
        """Return the row of each server, by its backend and name; its `status` is UP, DOWN, DRAIN, MAINT or UP 1/3."""
        rows = csv.DictReader(self.ask("show stat").removeprefix("# ").strip().splitlines())
        return {(row["pxname"], row["svname"]): row for row in rows}

    def status(self, server: str) -> str:
        """Return what the checks of an instance say."""
        return self.statistics()["kuaishang", server]["status"]

    def is_up(self, server: str) -> bool:
        return self.status(server) == "UP"

    def is_out(self, server: str) -> bool:
        """Whether it gets no new requests."""
        return not self.status(server).startswith("UP")

    def reload(self) -> None:
        before = self._serving()
        self.state.write_text(self.ask("show servers state"))
        self.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: self._serving() not in ("", before))

    def _serving(self) -> str:
        with suppress(OSError):
            found = re.search(r"^Pid: (\d+)", self.ask("show info"), re.MULTILINE)
            return found[1] if found else ""
        return ""

    def discard(self) -> None:
        super().discard()
        self._short.cleanup()


class Nginx(LoadBalancer):
    """nginx with deploy/nginx/kuaishang.conf.

    :param more: directives of the http block.
    """

    def __init__(self, folder: Path, servers: Mapping[str, str], more: str = "", **options: Any) -> None:
        self._more = more
        super().__init__(folder, servers, **options)

    def configure(self, servers: Mapping[str, str], different: Mapping[str, str]) -> None:
        folder, text = self.folder, (ROOT / "deploy" / "nginx" / "kuaishang.conf").read_text()
        here = {
            "listen 80;": f"listen {self.host}:{self.plain_port};",
            "listen 443 ": f"listen {self.host}:{self.port} ",
            "/etc/ssl/certs/kuaishang.crt": str(self.certificate),
            "/etc/ssl/private/kuaishang.key": str(self.key),
            "/var/log/nginx/access.log": str(self.log),
            **different,
        }
        for shipped, other in here.items():
            assert shipped in text, shipped
            text = text.replace(shipped, other)
        [shipped] = re.findall(r"(?m)^    server 127\.0\.0\.1:8000 .*\n    server 127\.0\.0\.1:8000 .*\n", text)
        text = text.replace(shipped, "".join(shipped.replace("127.0.0.1:8000", server) for server in servers.values()))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        main = f"daemon off; worker_processes 1; pid {folder}/pid; error_log {self.errors};\n"
        main += "user root;\n" if os.getuid() == 0 else ""
        http = f"http {{\naccess_log off;\n{self._more}\n{paths}{text}\n}}\n"
        (folder / "nginx.conf").write_text(f"{main}events {{}}\n{http}")
        self.command = [str(NGINX), "-p", str(folder), "-e", str(self.errors), "-c", "nginx.conf"]

    def reload(self) -> None:
        before = self.family()
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: {*self.family()} - {*before})
