"""deploy/server/README.md, line by line, on a bare Debian 12: a folder that debootstrap fills, in which systemd boots.

Not part of `make test`, as it takes about seven minutes, root and the internet:

    .venv/bin/python -m pytest tests/deploy/bare_server.py

The machine has only a loopback interface, so that all ports are free on it. So the packages and wheels of the README's
lines come before it boots. WeChat is the simulator. BARE_SERVER names a folder with a machine to copy, made by
debootstrap with INCLUDED, which saves two minutes.
"""

import ctypes
import os
import re
import shutil
import subprocess
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.blueprints.callers import ORDER
from tests.harness import APP_SECRET, ROOT, WAIT_SECONDS, Simulator, bearer, wait_until

README = ROOT / "deploy" / "server" / "README.md"
INCLUDED = "systemd,systemd-sysv,dbus"
"""What Debian's smallest system lacks of a server's."""
TREE = "/opt/kuaishang"
HOME = "srv/kuaishang"
ENVIRON = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
BOOT = """
mount --make-rprivate /
mount --bind "$0" "$0"
cd "$0"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for folder in run tmp dev/shm; do mount -t tmpfs tmpfs $folder; done
pivot_root . .  # a chroot may have no user namespaces, which the unit of Redis wants
umount --lazy .
exec /lib/systemd/systemd
"""
CLONE_NEWNET = 0x40000000
WHEELS = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/opt/wheels"}
# The certificate is self-signed.
pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")


def commands(section: str) -> list[str]:
    """Return the blocks of commands in a section of the README."""
    [text] = [part for part in README.read_text().split("\n## ") if part.lstrip("# ").startswith(section)]
    return [textwrap.dedent(block) for block in re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)]


class Machine:
    """A folder with Debian's smallest system and systemd.

    :param stack: ends it.
    """

    simulator: Simulator

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        if base := os.environ.get("BARE_SERVER"):
            subprocess.run(["cp", "--archive", f"{base}/.", root], check=True)
        else:
            debootstrap = shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin")
            assert debootstrap, "debootstrap is not installed"  # nobody runs this file by the way: nothing is skipped
            command = [debootstrap, "--variant=minbase", f"--include={INCLUDED}", "bookworm", str(root)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        root.chmod(0o755)  # pytest made it for its owner alone
        enter = 'mount -t proc proc "$0/proc"; exec chroot "$0" "$@"'
        self._within = ["unshare", "--mount", "sh", "-ec", enter, str(root)]
        self._stack = stack

    def copy(self, path: Path, place: Path | None = None) -> None:
        """Copy a file of this machine, if there is one; to the same place by default."""
        if path.is_file():
            target = self.root / (place or path).relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)

    def run(self, script: str, cwd: str = TREE, **environ: str) -> str:
        """Run lines as root, each one shown; stop at the first one that fails."""
        command = [*self._within, "bash", "-ec", f"cd {cwd}; exec bash -ev"]
        done = subprocess.run(
            command, input=script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRON | environ
        )
        print(done.stdout, flush=True)
        assert done.returncode == 0, f"{script}\n{self.journal()}"
        return done.stdout

    def journal(self) -> str:
        words = ["journalctl", "--directory", str(self.root / "var/log/journal"), "--no-pager", "--lines=60"]
        return subprocess.run(words, capture_output=True, text=True).stdout if shutil.which("journalctl") else ""

    def boot(self) -> None:
        """Let systemd start what is enabled; then this process is on the machine's network."""
        findmnt = ["findmnt", "--noheadings", "--output=TARGET", "--types=cgroup2"]
        cgroup = Path(subprocess.check_output(findmnt, text=True).split()[0], f"bare-server-{os.getpid()}")
        cgroup.mkdir()
        self._stack.callback(remove_cgroup, cgroup)
        enter = 'echo $$ >"$1/cgroup.procs"; exec unshare --mount --pid --fork --kill-child --cgroup --uts --ipc --net'
        booted = subprocess.Popen(
            ["sh", "-ec", f'{enter} sh -ec "$2" "$0"', self.root, cgroup, BOOT],
            env=ENVIRON | {"container": "other"},
        )
        self._stack.callback(booted.wait)
        [init] = wait_until(psutil.Process(booted.pid).children)
        self._stack.callback(init.kill)  # and with it all others
        its_root = f"/proc/{init.pid}/root"
        self._within = ["nsenter", f"--target={init.pid}", "--all", f"--root={its_root}", f"--wd={its_root}"]
        state = wait_until(lambda: self.state() in ("running", "degraded") and self.state())
        print(f"systemd is {state}")
        self._stack.enter_context(network_of(init.pid))

    def state(self) -> str:
        command = [*self._within, "systemctl", "is-system-running"]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRON).stdout.strip()


def remove_cgroup(folder: Path) -> None:
    for inner in sorted(folder.rglob("*/"), reverse=True):
        inner.rmdir()
    folder.rmdir()


@contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Let this thread, and what it starts, be on the network of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as own, open(f"/proc/{pid}/ns/net") as its:
        assert libc.setns(its.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        yield
        libc.setns(own.fileno(), CLONE_NEWNET)


class Load(threading.Thread):
    """Reads and orders through nginx, each time on a connection that stays, until it is over."""

    def __init__(self, token: str) -> None:
        super().__init__(daemon=True)
        self._token = token
        self._over = threading.Event()
        self.outcomes: Counter[Any] = Counter()

    def run(self) -> None:
        with requests.Session() as session:
            while not self._over.wait(0.02):
                for method, path, body in (("GET", "users/me", None), ("POST", "orders", ORDER)):
                    try:
                        answer = call(session, method, f"/api/v1/{path}", json=body, headers=bearer(self._token))
                        self.outcomes[answer.status_code] += 1
                    except requests.RequestException as error:
                        self.outcomes[str(error)] += 1

    def end(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def load(token: str) -> Iterator[Counter[Any]]:
    """Send requests until the end of the block, and count their statuses."""
    threads, outcomes = [Load(token) for _ in range(4)], Counter[Any]()
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        for thread in threads:
            thread.end()
            outcomes.update(thread.outcomes)
        print(dict(outcomes))


def call(client: Any, method: str, path: str, **options: Any) -> requests.Response:
    answer: requests.Response = client.request(
        method, f"https://127.0.0.1{path}", verify=False, timeout=WAIT_SECONDS, **options
    )
    return answer


def commit() -> str:
    return str(call(requests, "GET", "/version").json()["data"]["commit"])


def assert_serves(release: str) -> None:
    """Check it as soon as nginx has left its connections to the workers that have just retired."""
    wait_until(lambda: all(commit() == release for _ in range(9)))


def log_in(simulator: Simulator) -> str:
    answer = call(requests, "POST", "/api/v1/auth/wechat", json={"code": simulator.code()})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"]["token"])


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the sequence of the README has run."""
    assert os.getuid() == 0, "this needs root"
    packages, *steps = commands("A server")
    root = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root)
        machine = Machine(root, stack)
        began = time.monotonic()
        machine.copy(Path("/etc/resolv.conf"))
        policy = root / "usr/sbin/policy-rc.d"  # packages start nothing before it boots
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        machine.run(packages, cwd="/", DEBIAN_FRONTEND="noninteractive")
        policy.unlink()
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            machine.copy(ROOT / name, Path(TREE, name))
        download(machine)
        machine.boot()
        simulator = Simulator(root / "simulator")
        stack.callback(simulator.process.stop)
        machine.simulator = simulator
        for step in steps:
            lines = machine.run(step, **WHEELS)
            assert "uv cannot install" not in lines
            if "WECHAT_APP_SECRET" in step:  # what the README says in words
                env = root / HOME / ".env"
                text = env.read_text().replace("change-me", APP_SECRET)
                env.write_text(f"{text}WECHAT_API_BASE_URL={simulator.url}\n")
        print(f"the whole sequence took {time.monotonic() - began:.0f} s")
        yield machine


def pins(*names: str) -> str:
    """Return the lines of packages that the service does not need, as requirements.txt would have them."""
    wanted = rf"^(?:{'|'.join(names)})==.*\n(?: +--hash.*\n)+"
    found = re.findall(wanted, (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert len(found) == len(names)
    return "".join(found)


def added_pin() -> str:
    return pins("iniconfig")


def download(machine: Machine) -> None:
    """Fetch the wheels while there is a network, from where this machine's pip is configured to look."""
    environ = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "_proxy" in name.lower()}
    for path in ("/etc/pip.conf", "/root/.config/pip/pip.conf", os.environ.get("PIP_CERT", "")):
        machine.copy(Path(path))
    pip = "/opt/pip/bin/python -m pip download --quiet --dest /opt/wheels"
    (machine.root / "opt/more.txt").write_text(pins("iniconfig", "setuptools", "uv"))
    wheels = (f"{pip} --require-hashes -r {name}" for name in ("requirements.txt", "/opt/more.txt"))
    script = "\n".join(("python3 -m venv /opt/pip", *wheels, ""))
    machine.run(script, **environ)


def test_the_service_responds_behind_nginx_and_nothing_else_does(machine: Machine) -> None:
    assert call(requests, "GET", "/readyz").status_code == 200
    assert requests.get("http://127.0.0.1/readyz", allow_redirects=False, timeout=WAIT_SECONDS).status_code == 308
    assert call(requests, "GET", "/metrics").json() == {"code": 404, "message": "资源不存在", "data": None}
    listening = [one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening if address.ip not in ("127.0.0.1", "::1")} == {80, 443}


def test_the_settings_are_for_the_service_alone(machine: Machine) -> None:
    assert machine.run(f"stat --format='%U %G %a' /{HOME}/.env").splitlines()[-1] == "kuaishang kuaishang 600"
    assert machine.run("systemctl show --property=MainPID,User kuaishang").splitlines()[-1] == "User=kuaishang"


def test_no_line_of_a_burst_is_dropped(machine: Machine) -> None:
    line = "systemctl show --property=LogRateLimitIntervalUSec kuaishang"
    assert machine.run(line).splitlines()[-1] == "LogRateLimitIntervalUSec=0"


def test_an_archive_of_another_user_goes_live(machine: Machine) -> None:
    [block] = commands("From then on")
    patch, rollback, _ = block.splitlines()
    before, command = commit(), patch.partition("#")[0].rstrip()
    machine.run("cp -r . /opt/next; echo '# another' >>/opt/next/wsgi.py; tar -czf /opt/next.tar.gz -C /opt next")
    machine.run(f'{command} FROM=/opt/next.tar.gz BY="Li Lei" WATCH_SECONDS=1')
    wait_until(lambda: commit() != before)  # nginx may have kept a connection to a worker that ends
    machine.run(rollback)
    assert_serves(before)


def test_systemd_finds_nothing_wrong_with_the_unit(machine: Machine) -> None:
    line = "systemd-analyze verify kuaishang.service"
    assert machine.run(line).splitlines() == [line]


def test_the_ways_from_then_on_drop_no_request(machine: Machine) -> None:
    [block] = commands("From then on")
    patch, rollback, status = block.splitlines()
    before = commit()
    code = machine.root / TREE[1:] / "blueprints" / "orders.py"
    with load(log_in(machine.simulator)) as outcomes:
        code.write_text(f"{code.read_text()}# a patch\n")
        machine.run(patch, WATCH_SECONDS="3")
        wait_until(lambda: commit() != before)
        after = commit()
        lines = machine.run(status).splitlines()
        assert [line for line in lines if line.startswith("serves: ") and after in line]
        assert "  blueprints/orders.py +1 -0" in lines
        machine.run(rollback)
        assert_serves(before)
        env = machine.root / HOME / ".env"
        env.write_text(re.sub("METRICS_TOKEN=.*", f"METRICS_TOKEN={'new' * 8}", env.read_text()))
        machine.run("systemctl reload kuaishang")
        metrics = {"url": "http://127.0.0.1:8000/metrics", "headers": bearer("new" * 8)}
        wait_until(lambda: all(requests.get(**metrics, timeout=WAIT_SECONDS).status_code == 200 for _ in range(9)))
    assert set(outcomes) == {200, 201}, outcomes


def test_a_patch_of_the_requirements_gets_an_environment_of_its_own(machine: Machine) -> None:
    [block] = commands("From then on")
    patch, rollback, _ = block.splitlines()
    before, environments, tree = commit(), machine.root / HOME / "environments", machine.root / TREE[1:]
    assert len([*environments.iterdir()]) == 1  # shared by the releases until now
    for file, lines in (("requirements.txt", added_pin()), ("wsgi.py", "import iniconfig\n")):
        (tree / file).write_text(f"{(tree / file).read_text()}{lines}")
    with load(log_in(machine.simulator)) as outcomes:
        machine.run(patch, WATCH_SECONDS="1", **WHEELS)
        wait_until(lambda: commit() != before)
        assert len([*environments.iterdir()]) == 2
        machine.run(rollback)
        assert_serves(before)
    assert set(outcomes) == {200, 201}, outcomes


def test_flask_has_the_settings_of_the_service(machine: Machine) -> None:
    [block] = commands("The commands of the service")
    said = machine.run(block).splitlines()
    assert ("Nothing is switched off." in said, said[-1]) == (True, "All is under the first key."), said


def test_a_request_is_found_in_the_journal(machine: Machine) -> None:
    trace_id = call(requests, "GET", "/nowhere").headers["X-Trace-Id"]
    journal = "journalctl -u kuaishang -o cat"
    script = f"until {journal} | grep -q {trace_id}; do sleep 0.1; done\n{journal} | make trace ID={trace_id} LOGS=-"
    lines = machine.run(script).splitlines()
    assert len([line for line in lines if "method=GET status=404" in line]) == 1


def test_systemd_starts_again_what_was_killed(machine: Machine) -> None:
    machine.run("systemctl kill --signal=KILL kuaishang")
    wait_until(lambda: call(requests, "GET", "/readyz").status_code == 503)
    wait_until(lambda: call(requests, "GET", "/readyz").status_code == 200)
    machine.run("systemctl restart kuaishang")
    assert call(requests, "GET", "/readyz").status_code == 200
