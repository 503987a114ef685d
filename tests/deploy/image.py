"""The images that deploy/docker/test.sh builds, run by podman: with as little as a container can have, they serve.

Not part of `make test`, as it needs podman, root and some minutes: deploy/docker/test.sh. In the place of the official
images are Debian's Python, and this machine's Redis and MariaDB.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from deploy.binary.build import sources
from dev.redis_server import RedisServer, executable
from settings import VERSION
from tests.blueprints.callers import ORDER
from tests.harness import (
    METRICS_TOKEN,
    ROOT,
    WAIT_SECONDS,
    Simulator,
    answers,
    bearer,
    bound_to_this_process,
    free_port,
    wait_until,
)

BASE, IMAGE, DEVELOPMENT = (f"localhost/kuaishang-test/{name}" for name in ("python", "service", "development"))
SHELLS = ("/usr/bin/dash", "/usr/bin/bash")
"""Of the base; /bin/sh leads to one of them. What lies over them cannot be executed."""
AS_LITTLE = [
    "--read-only",
    "--read-only-tmpfs=false",  # podman would add /tmp and /run; Docker does not
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--network=host",  # where the tests' Redis and simulator are
    *(f"--volume=/dev/null:{shell}:ro" for shell in SHELLS),
]
CHECK_SECONDS = 300
"""What starting compose.yaml may take: it installs the environment first."""


def podman(*words: str) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=CHECK_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS, check=True)
    return done.stdout.strip()


class Container:
    """A container of the service, on a port of its own.

    :param options: further ones of `podman run`.
    """

    def __init__(self, environ: dict[str, str], options: Sequence[str] = ()) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = [f"--env={name}={value}" for name, value in {**environ, "PORT": str(port)}.items()]
        self.name = podman("run", "--detach", *AS_LITTLE, *options, *settings, IMAGE).strip()

    def state(self) -> dict[str, Any]:
        (described,) = json.loads(podman("inspect", self.name))
        return described["State"]  # type: ignore[no-any-return]

    def responds(self) -> bool:
        assert self.state()["Running"], podman("logs", self.name)
        return answers(f"{self.url}/livez")

    def healthy(self) -> bool:
        done = subprocess.run(["podman", "healthcheck", "run", self.name], capture_output=True, timeout=WAIT_SECONDS)
        return done.returncode == 0

    def stop(self) -> int:
        """Stop it as a platform does, which kills it after 30 s, and return its exit status."""
        podman("stop", "--time=30", self.name)
        return self.state()["ExitCode"]  # type: ignore[no-any-return]


@pytest.fixture
def settings(environ: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The settings of a container, with a Redis on a port, as its socket is for one user alone."""
    port = free_port()
    with closing(RedisServer(tmp_path / "redis", bound_to_this_process(), port=str(port))) as server:
        server.start()
        yield {**environ, "REDIS_URL": f"redis://127.0.0.1:{port}/0", "DATABASE_URL": "sqlite:////data/kuaishang.db"}


@pytest.fixture
def start() -> Iterator[Callable[..., Container]]:
    with ExitStack() as stack:

        def start(*args: Any) -> Container:
            container = Container(*args)
            stack.callback(podman, "rm", "--force", "--time=0", "--volumes", container.name)
            wait_until(container.responds)
            return container

        yield start


@pytest.mark.parametrize("user", ["", "4321:4321"], ids=["its own user", "another user"])
def test_it_migrates_serves_and_stops_read_only_without_root_and_without_a_shell(
    user: str, settings: dict[str, str], start: Callable[..., Container], simulator: Simulator, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        if user:
            folder = tmp_path / "data"
            folder.mkdir()
            folder.chmod(0o777)
            options = [f"--volume={folder}:/data", f"--user={user}"]
        else:  # a volume belongs to the image's user
            volume = podman("volume", "create").strip()
            stack.callback(podman, "volume", "rm", "--force", "--time=0", volume)
            options = [f"--volume={volume}:/data"]
        database = f"--env=DATABASE_URL={settings['DATABASE_URL']}"
        podman("run", "--rm", *AS_LITTLE, *options, database, IMAGE, "alembic", "upgrade", "head")
        container = start({**settings, "DRAIN_SECONDS": "1"}, options)
        assert requests.get(f"{container.url}/readyz", timeout=WAIT_SECONDS).status_code == 200
        assert container.healthy()
        release = requests.get(f"{container.url}/version", timeout=WAIT_SECONDS).json()["data"]
        (image,) = json.loads(podman("image", "inspect", IMAGE))
        built_as = [image["Config"]["Labels"][f"org.opencontainers.image.{name}"] for name in ("version", "revision")]
        if git("status", "--porcelain"):  # its commit does not say all that is in it
            assert built_as == [VERSION, ""]
            assert re.fullmatch("[0-9a-f]{12}", release["commit"])
        else:
            assert built_as == [VERSION, git("rev-parse", "--short=12", "HEAD")]
            assert release["built"] == image["Config"]["Labels"]["org.opencontainers.image.created"]
            assert [release["version"], release["commit"]] == built_as

        def log_in() -> requests.Response:
            body = {"code": simulator.code()}
            return requests.post(f"{container.url}/api/v1/auth/wechat", json=body, timeout=WAIT_SECONDS)

        for language, name in (("zh", "openapi.json"), ("en", "openapi.en.json")):
            document = requests.get(f"{container.url}/openapi.json?lang={language}", timeout=WAIT_SECONDS)
            assert document.content == (ROOT / name).read_bytes()
        for file in ("/docs", "/docs/docs.js", "/docs/docs.css", "/docs/assets/swagger-ui-bundle.js"):
            assert requests.get(f"{container.url}{file}", timeout=WAIT_SECONDS).status_code == 200, file

        headers = bearer(log_in().json()["data"]["token"])
        ordered = requests.post(f"{container.url}/api/v1/orders", json=ORDER, headers=headers, timeout=WAIT_SECONDS)
        assert ordered.status_code == 201, ordered.text
        said = podman("exec", container.name, "flask", "--app", "deploy.keys", "keys", "status")
        assert said.splitlines()[-1] == "All is under the first key."

        simulator.forget()
        simulator.fault("slow", seconds=3)
        with ThreadPoolExecutor(1) as pool:
            in_flight = pool.submit(log_in)
            wait_until(simulator.calls)
            assert container.stop() == 0
            assert in_flight.result().status_code == 200


def test_the_health_check_notices_that_no_process_responds(
    settings: dict[str, str], start: Callable[..., Container]
) -> None:
    container = start(settings)  # without a database, which is no reason to restart it
    assert container.healthy()
    master = psutil.Process(container.state()["Pid"])
    family = [master, *master.children()]
    for process in family:
        process.suspend()
    assert not container.healthy()
    for process in family:
        process.resume()
    wait_until(container.healthy)


def test_a_reload_reads_the_file_of_a_mounted_folder_again(
    settings: dict[str, str], start: Callable[..., Container], tmp_path: Path
) -> None:
    folder = tmp_path / "settings"
    folder.mkdir()
    tokens = METRICS_TOKEN, "another-token-nobody-may-see"

    def write(token: str) -> None:
        file = folder / ".env.new"
        file.touch(0o600)
        file.write_text("".join(f"{name}={value}\n" for name, value in {**settings, "METRICS_TOKEN": token}.items()))
        os.chown(file, 10001, 10001)
        file.replace(folder / ".env")

    def accepted() -> list[bool]:
        url = f"{container.url}/metrics"
        return [requests.get(url, headers=bearer(token), timeout=WAIT_SECONDS).ok for token in tokens]

    write(tokens[0])
    container = start({"ENV_FILE": "/settings/.env"}, [f"--volume={folder}:/settings:ro"])
    assert accepted() == [True, False]
    write(tokens[1])
    podman("kill", "--signal=HUP", container.name)
    wait_until(lambda: accepted() == [False, True])
    assert container.healthy()


def test_the_image_holds_the_service_alone_which_can_write_to_none_of_it() -> None:
    look = """
import json, os
paths = [os.path.join(folder, name) for top in ("/app", "/environment") for folder, _, names in os.walk(top)
         for name in (*names, ".")]
print(json.dumps([os.stat("/data").st_uid, {path: os.access(path, os.W_OK) for path in paths}]))
"""
    owner, writable = json.loads(podman("run", "--rm", IMAGE, "python", "-c", look))
    assert owner == 10001  # Docker gives a new volume the owner of what it covers
    assert [path for path in writable if writable[path]] == []
    files = {path.removeprefix("/app/") for path in writable if path.startswith("/app/")}
    service = {str(path) for path in sources() if path.parts[0] not in ("deploy", "dev")}
    service |= {"deploy/docker/healthcheck.py", "deploy/keys/__init__.py", "storage/migrations/script.py.mako"}
    service |= {f"deploy/patch/{name}.py" for name in ("generation", "supervisor", "trial")}  # for a reload
    assert {path for path in files if not path.endswith((".", ".pyc"))} - {"release.json"} == service


class Compose:
    """compose.yaml of a copy of the source, run by Docker's own client, with podman in the place of Docker's engine."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        listed = git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        self.files = {path for path in listed if (ROOT / path).exists()}
        for path in self.files:
            (self.source / path).parent.mkdir(parents=True, exist_ok=True)
            (self.source / path).write_bytes((ROOT / path).read_bytes())
            (self.source / path).chmod((ROOT / path).stat().st_mode)
        self.port, self.simulator_port = free_port(), free_port()
        self.url, self.simulator_url = (f"http://127.0.0.1:{port}" for port in (self.port, self.simulator_port))
        self.project = f"kuaishang-test-{self.port}"
        self._socket = folder / "podman.sock"
        self._substitutes = folder / "substitutes.json"
        self._substitutes.write_text(json.dumps({"services": self._services()}))

    def _services(self) -> dict[str, Any]:
        built = {"image": DEVELOPMENT, "pull_policy": "never"}
        ours = {"image": BASE, "pull_policy": "never", "volumes": ["/usr:/usr:ro", f"{executable()}:/redis-server:ro"]}
        mariadb = r"""
mariadb-install-db --no-defaults --user=root --datadir=/var/lib/mysql --skip-test-db
printf '%s;\n' "CREATE DATABASE $$MARIADB_DATABASE" \
  "CREATE USER '$$MARIADB_USER'@'%' IDENTIFIED BY '$$MARIADB_PASSWORD'" \
  "GRANT ALL ON $$MARIADB_DATABASE.* TO '$$MARIADB_USER'@'%'" >/tmp/init
exec /usr/sbin/mariadbd --no-defaults --user=root --datadir=/var/lib/mysql --socket=/tmp/socket --init-file=/tmp/init
"""
        ping = ["CMD", "mariadb-admin", "--no-defaults", "--protocol=tcp", "--host=127.0.0.1", "ping"]
        return {
            **dict.fromkeys(("environment", "service", "simulator"), built),
            "redis": {
                **ours,
                "entrypoint": ["sh", "-c", 'exec /redis-server "$$@"'],
                "healthcheck": {"test": ["CMD", "true"]},
            },
            "mariadb": {**ours, "command": ["sh", "-euc", mariadb], "healthcheck": {"test": ping}},
        }

    def __call__(self, *words: str) -> str:
        files = [self.source / "deploy/docker/compose.yaml", self._substitutes]
        command = [*os.environ["COMPOSE"].split(), "--project-name", self.project]
        command += [f"--file={file}" for file in files]
        ports = {"PORT": str(self.port), "SIMULATOR_PORT": str(self.simulator_port)}
        env = {**os.environ, **ports, "DOCKER_HOST": f"unix://{self._socket}"}
        done = subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=CHECK_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def up(self) -> Iterator[None]:
        service = ["podman", "system", "service", "--time=0", f"unix://{self._socket}"]
        with subprocess.Popen([*bound_to_this_process(), *service], stderr=subprocess.DEVNULL) as engine:
            done = threading.Event()
            checks = threading.Thread(target=self._check, args=[done])
            try:
                wait_until(self._socket.exists)
                checks.start()
                self("up", "--no-build", "--detach")
                yield
            except BaseException as error:
                error.add_note(self("logs"))
                raise
            finally:
                done.set()
                self("down", "--volumes", "--timeout=5")
                engine.terminate()

    def _check(self, done: threading.Event) -> None:
        """Run the health checks, which is systemd's task where podman is at home."""
        while not done.wait(1):
            for name in ("redis", "mariadb"):
                subprocess.run(["podman", "healthcheck", "run", f"{self.project}-{name}-1"], capture_output=True)


@pytest.mark.skipif(not shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin"), reason="no mariadbd here")
def test_compose_yaml_serves_with_the_simulator_and_reloads_what_is_saved(tmp_path: Path) -> None:
    compose = Compose(tmp_path)
    with compose.up():
        wait_until(lambda: answers(f"{compose.url}/readyz"))
        code = requests.post(f"{compose.simulator_url}/simulator/codes", timeout=WAIT_SECONDS).json()["code"]
        login = f"{compose.url}/api/v1/auth/wechat"
        assert requests.post(login, json={"code": code}, timeout=WAIT_SECONDS).status_code == 200
        push = {"message": {"MsgType": "text", "Content": "1"}}
        (pushed,) = requests.post(f"{compose.simulator_url}/simulator/push", json=push, timeout=WAIT_SECONDS).json()[
            "answers"
        ]
        assert (pushed["status"], pushed["body"]) == (200, "success")

        file = compose.source / "settings.py"
        file.write_text(file.read_text().replace(f'VERSION = "{VERSION}"', 'VERSION = "9.9.9"'))
        wait_until(
            lambda: requests.get(f"{compose.url}/version", timeout=WAIT_SECONDS).json()["data"]["version"] == "9.9.9"
        )
    there = {str(path.relative_to(compose.source)) for path in compose.source.rglob("*") if path.is_file()}
    assert there == compose.files  # nothing is written where the source is
