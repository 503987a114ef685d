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
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.harness import ROOT, WAIT_SECONDS, bound_to_this_process, free_port, suspend, wait_until

PATH = f"{os.environ['PATH']}:/usr/sbin"
HAPROXY, NGINX = shutil.which("haproxy", path=PATH), shutil.which("nginx", path=PATH)


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended, even if nobody has asked for its status."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


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

    @staticmethod
    @abstractmethod
    def answers_within(time: str) -> dict[str, str]:
        """Return what is different where an instance that does not answer within this time hangs."""

    @staticmethod
    @abstractmethod
    def waits_for_clients(time: str) -> dict[str, str]:
        """Return what is different where a client has this time for its headers, and for its body."""

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
            wait_until(lambda: not any(map(_runs, family)))

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
            return self.read(connection)

    @staticmethod
    def read(connection: socket.socket) -> tuple[HTTPResponse, bytes]:
        """Return the response that comes, and its body."""
        response = HTTPResponse(connection)
        response.begin()
        return response, response.read()

    def connect(self, plain: bool = False) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=WAIT_SECONDS)
        if plain:
            return connection
        context = ssl.create_default_context(cafile=self.certificate)
        return context.wrap_socket(connection, server_hostname=self.host)


class RuntimeSocket:
    """Of a HAProxy."""

    socket: str

    def ask(self, command: str, seconds: float = WAIT_SECONDS) -> str:
        """Send a command to the runtime socket, and return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(self.socket)
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def statistics(self) -> dict[tuple[str, str], dict[str, str]]:
        """Return the row of each server, by its backend and name; its `status` is UP, DOWN, DRAIN, MAINT or UP 1/3."""
        rows = csv.DictReader(self.ask("show stat").removeprefix("# ").strip().splitlines())
        return {(row["pxname"], row["svname"]): row for row in rows}


class HAProxy(LoadBalancer, RuntimeSocket):
    """HAProxy with deploy/haproxy/haproxy.cfg.

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

    @staticmethod
    def answers_within(time: str) -> dict[str, str]:
        return {"timeout server 11s": f"timeout server {time}"}

    @staticmethod
    def waits_for_clients(time: str) -> dict[str, str]:
        return {"http-request 10s": f"http-request {time}", "wait-for-body time 10s": f"wait-for-body time {time}"}

    @staticmethod
    def checks_every(time: str) -> dict[str, str]:
        """Return what is different where instances are checked so often."""
        return {"inter 5s fastinter 1s downinter 5s": f"inter {time} fastinter {time} downinter {time}"}

    def status(self, server: str, backend: str = "kuaishang") -> str:
        """Return what the checks of an instance say."""
        return self.statistics()[backend, server]["status"]

    def is_up(self, server: str) -> bool:
        """Whether an instance gets requests."""
        return self.status(server).startswith("UP")

    def move(self, server: str, address: str) -> None:
        """Write another address of an instance into the configuration."""
        file = self.folder / "haproxy.cfg"
        text, count = re.subn(rf"(?m)^(    server {server}) \S+", rf"\1 {address}", file.read_text())
        assert count == 2
        file.write_text(text)

    def reload(self) -> None:
        serving = self._serving()

        def is_reloaded() -> bool:
            # Until some milliseconds after a start or reload the master ignores it.
            wait_until(self._catches_the_signal)
            self.process.send_signal(signal.SIGUSR2)
            with suppress(AssertionError):
                wait_until(lambda: self._serving() not in ("", serving), 5)
                return True
            return False

        wait_until(is_reloaded)

    def _catches_the_signal(self) -> bool:
        [caught] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return bool(int(caught, 16) >> signal.SIGUSR2 - 1 & 1)

    def _serving(self) -> str:
        with suppress(OSError):
            # A process that is about to end may accept a connection, and not answer.
            found = re.search(r"^Pid: (\d+)", self.ask("show info", 1), re.MULTILINE)
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

    @staticmethod
    def answers_within(time: str) -> dict[str, str]:
        return {"proxy_read_timeout 11s": f"proxy_read_timeout {time}"}

    @staticmethod
    def waits_for_clients(time: str) -> dict[str, str]:
        return {f"client_{part}_timeout 10s": f"client_{part}_timeout {time}" for part in ("header", "body")}

    def reload(self) -> None:
        before = self.family()
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: {*self.family()} - {*before})


class Instance(ThreadingHTTPServer):
    """What stands for an instance: it answers 200 to everything, and keeps what came, but for probes."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Request)
        self.address = f"{host}:{self.server_port}"
        self._clients: list[socket.socket] = []
        self.is_ready = True
        self.fails = 0
        """So many probes."""
        self.probes: list[int] = []
        """The status of each answer to one."""
        self.came: list[str] = []
        self.closes = 0
        """So many requests are read, and then the connection ends."""
        self.may_answer = threading.Event()
        self.may_answer.set()
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def refuse(self) -> None:
        """Let new connections be refused; those that are open stay."""
        self.shutdown()
        self.server_close()

    def kill(self) -> None:
        """End its connections, too."""
        self.refuse()
        for client in list(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def discard(self) -> None:
        self.may_answer.set()
        self.kill()

    def get_request(self) -> tuple[socket.socket, Any]:
        client, address = super().get_request()
        self._clients.append(client)
        return client, address

    def handle_error(self, *_: object) -> None:
        """Be silent about clients that have gone."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Instance

    def respond(self) -> None:
        if self.path == "/readyz":
            status = 200 if self.server.is_ready and not self.server.fails else 503
            self.server.fails = max(self.server.fails - 1, 0)
            self.server.probes.append(status)
            self._send(status)
            return
        self.server.came.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.closes:
            self.server.closes -= 1
            self.close_connection = True
            return
        self.server.may_answer.wait(WAIT_SECONDS)
        self._send(200)

    do_GET = do_POST = do_PUT = do_DELETE = respond  # noqa: N815

    def _send(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be silent."""
