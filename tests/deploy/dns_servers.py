"""gdnsd with the configuration as shipped in deploy/dns, and a resolver that asks it as those of clients do.

`.ci/run` installs Debian's gdnsd, and dnsutils for dig.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.harness import ROOT, Process, Program, free_port, suspend, wait_until

FOLDER = ROOT / "deploy" / "dns"
NAME = "api.example.com"
PATH = f"{os.environ['PATH']}:/usr/sbin"
GDNSD, GDNSDCTL, DIG = (shutil.which(program, path=PATH) for program in ("gdnsd", "gdnsdctl", "dig"))
QUERY_SECONDS = 1
"""After which a resolver asks the other server."""


class Site(NamedTuple):
    """One of the sites behind the name."""

    address: str
    """Of its HAProxy."""
    weight: int
    """Its share of the traffic."""


class DnsServer:
    """gdnsd, and ramp.py beside it. They run when the constructor returns; two of these make a name's servers.

    :param folder: for its files.
    :param address: that it listens on, at a free port.
    :param sites: by name.
    :param check_port: the port of each site's HAProxy that answers /readyz without TLS.
    :param step_seconds: how long ramp.py leaves a site at a weight before the next one.
    :param different: texts of the configuration, each there at least once, and what stands in their place here.
    """

    def __init__(
        self,
        folder: Path,
        address: str,
        sites: Mapping[str, Site],
        check_port: int,
        step_seconds: float = 30,
        different: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = shutil.copytree(FOLDER, folder)
        self.step_seconds = step_seconds
        self.address = (address, free_port(address))
        self._short = tempfile.TemporaryDirectory(prefix="kuaishang-")  # the path of a socket has about 100 characters
        self.weights_file, self.log = folder / "weights", folder / "log"
        self.admin_state = folder / "state" / "admin_state"
        run, state = f"{self._short.name}/run", self.admin_state.parent
        options = f"listen => {address}:{self.address[1]}\n  run_dir => {run}\n  state_dir => {state}"
        here = {
            "listen => any": options,
            "/var/lib/gdnsd/weights": str(self.weights_file),
            "port => 80\n": f"port => {check_port}\n",
            **(different or {}),
        }
        text = (folder / "config").read_text()
        for shipped, other in here.items():
            assert shipped in text, shipped
            text = text.replace(shipped, other)
        (folder / "config").write_text(text)
        lines = "".join(f"{name} => [ {site.address}, {site.weight} ]\n" for name, site in sites.items())
        for file in (folder / "sites", self.weights_file):
            file.write_text(lines)
        self.start()

    def start(self) -> None:
        words = ["tests.deploy.reaper", str(GDNSD), "-c", str(self.folder), "start"]
        self._process = Process(words, {"PATH": PATH}, self.log, last_signal=signal.SIGTERM)
        try:
            wait_until(lambda: self._answers() or self._process.popen.poll() is not None)
            assert self._process.popen.poll() is None, self.log.with_suffix(".errors").read_text()
        except BaseException:
            self._process.kill()
            raise
        command = [sys.executable, str(FOLDER / "ramp.py"), str(self.folder / "sites"), str(self.weights_file)]
        options = ["--config", str(self.folder), "--seconds", str(self.step_seconds)]
        self.ramp = Program(self.folder / "ramp.log", [*command, *options], {"PATH": PATH})

    def _answers(self) -> bool:
        command = [str(DIG), f"@{self.address[0]}", "-p", str(self.address[1]), "+tries=1", "+timeout=1", NAME, "SOA"]
        return subprocess.run(command, capture_output=True).returncode == 0

    def states(self) -> dict[str, str]:
        """Return what its checks say, UP or DOWN, by the address of the site."""
        command = [str(GDNSDCTL), "-c", str(self.folder), "states"]
        # It dies of a SIGPIPE if gdnsd is just replacing itself.
        states = json.loads(wait_until(lambda: subprocess.run(command, capture_output=True).stdout))
        return {address.partition("/")[0]: state["real_state"] for address, state in states.items()}

    def weights(self) -> dict[str, int]:
        """Return the weights that it answers by now, by the name of the site."""
        lines = (line.replace(",", "").split() for line in self.weights_file.read_text().splitlines())
        return {name: int(weight) for name, _, _, _, weight, _ in lines}

    def steps(self, name: str) -> list[int]:
        """Return the weights that a site has been given, oldest first."""
        log = (self.folder / "ramp.log").read_text()
        return [int(weight) for weight in re.findall(rf"^{name}: weight \d+ -> (\d+) ", log, re.MULTILINE)]

    @contextmanager
    def without_ramp(self) -> Iterator[None]:
        """Let ramp.py not run for a while: it changes the weights at any time, and first of all."""
        self.ramp.suspend()
        assert self.ramp.process
        ramp = psutil.Process(self.ramp.process.pid)
        # What it runs, such as a replacement of gdnsd, ends first.
        wait_until(lambda: all(one.status() == psutil.STATUS_ZOMBIE for one in ramp.children()))
        self.ramp.kill()
        try:
            yield
        finally:
            self.ramp.start()

    def family(self) -> list[psutil.Process]:
        """Return its processes, of which one may just be replacing the other."""
        return psutil.Process(self._process.popen.pid).children(recursive=True)

    def suspend(self) -> None:
        for process in self.family():
            suspend(process)

    def resume(self) -> None:
        for process in self.family():
            process.resume()

    def kill(self) -> None:
        """End all its processes, as a crash of the machine would."""
        self.ramp.kill()
        wait_until(self._killed)

    def _killed(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            for process in self.family():
                process.kill()
        return self._process.popen.poll() is not None  # the reaper, which ends after them

    def discard(self) -> None:
        """End it for good."""
        self.kill()
        self._short.cleanup()


class Resolver:
    """A client's resolver: asks one of the name servers, and keeps the answer for as long as it says.

    It stays with the server that answered last, and asks the next one if that does not within a second.
    """

    def __init__(self, servers: Sequence[tuple[str, int]], name: str = NAME) -> None:
        self._servers = list(servers)
        self._name = name
        self._address, self._expires = "", 0.0

    def address(self) -> str:
        """Return an address of the name.

        :raises LookupError: if no server answers.
        """
        if time.monotonic() < self._expires:
            return self._address
        for _ in range(len(self._servers)):
            asked = time.monotonic()
            answers = query(self._servers[0], self._name)
            if answers:
                ttl, self._address = answers[0]
                self._expires = asked + ttl
                return self._address
            self._servers.append(self._servers.pop(0))
        raise LookupError(f"no answer about {self._name}")


def query(server: tuple[str, int], name: str = NAME, times: int = 1, tries: int = 1) -> list[tuple[int, str]]:
    """Ask a server for addresses so many times; returns TTL and address of each answer, none if it does not answer.

    :param tries: how often each question is sent, until there is an answer; a second for each.
    """
    options = [
        f"@{server[0]}",
        "-p",
        str(server[1]),
        f"+tries={tries}",
        f"+timeout={QUERY_SECONDS}",
        "+noall",
        "+answer",
    ]
    command = [str(DIG), *options, *[name, "A"] * times]
    outcome: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True)
    rows: list[Any] = [line.split() for line in outcome.stdout.splitlines() if not line.startswith(";")]
    return [(int(ttl), address) for _, ttl, _, kind, address in rows if kind == "A"]
