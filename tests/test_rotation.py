"""Secrets change while the service runs, as docs/en/production.md says: edit the file, HUP the master, lose nothing.

Two instances share Redis, the database and the file, and one of them reloads while the other still has the settings
of before. Clients send each request to either of them.
"""

import base64
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from errors import Code
from tests.blueprints.callers import ORDER
from tests.databases import Databases
from tests.harness import ROOT, WAIT_SECONDS, Service, Simulator, bearer, migrate, until_available, wait_until
from tests.otlp_receiver import OtlpReceiver
from tests.test_journey import Browser

StartService = Callable[..., Service]
ROTATED = ("SECRET_KEY", "ENCRYPTION_KEYS", "METRICS_TOKEN", "WECHAT_APP_SECRET")
NEW_METRICS_TOKEN, NEW_APP_SECRET = "another-token-nobody-may-see", "another-app-secret-nobody-may-see"
REFUSED = Code.WECHAT_REFUSED.status
"""What a login gets while the service does not have the secret yet that WeChat wants."""
THINK_SECONDS = 0.1


class Deployment:
    """Instances with some of their settings in a file."""

    def __init__(self, file: Path, settings: dict[str, str], start: Callable[[str], Service]) -> None:
        self.file, self.settings = file, settings
        self.write()
        self.services = [start("one"), start("other")]

    def write(self, **different: str) -> None:
        """Replace the file in one step, with these settings changed."""
        self.settings |= different
        draft = self.file.with_suffix(".draft")
        draft.touch(0o600)
        draft.write_text("".join(f"{name}={value}\n" for name, value in self.settings.items()))
        draft.replace(self.file)

    def any(self) -> Service:
        return random.choice(self.services)

    def change(self, load: "Load", **different: str) -> None:
        """Change settings, and reload one instance after the other."""
        self.write(**different)
        for service in self.services:
            reload(service)
            load.go_on()


def reload(service: Service) -> None:
    """Send the master a HUP, and wait until it has new workers, all of which serve, and no others."""
    old, many = {worker.pid for worker in service.workers()}, int(service.environ["WEB_CONCURRENCY"])
    os.kill(service.process.popen.pid, signal.SIGHUP)

    def is_reloaded() -> bool:
        now = {worker.pid for worker in service.workers()}  # and the trial of what is reloaded, for some seconds
        return len(now) == many and not now & old

    wait_until(is_reloaded)
    requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS)


class Load:
    """Clients that never stop, each request on a connection of its own, and what went wrong for them."""

    def __init__(self, deployment: Deployment, simulator: Simulator) -> None:
        self.deployment, self.simulator = deployment, simulator
        self.failures: list[str] = []
        self.done: Counter[str] = Counter()
        self.refused = 0
        self.metrics_token = deployment.settings["METRICS_TOKEN"]
        self.over = threading.Event()
        self.rounds: dict[str, Callable[[requests.Session], None]] = {}
        self.phones: dict[str, str] = {}
        """The phone number of each user, by token."""
        for _ in range(3):
            self.log_in(requests.Session())
        self.tokens = list(self.phones)
        self.rounds = {
            "read": self.read,
            "order": self.order,
            "phone": self.change_phone,
            "login": self.log_in,
            **{f"web login {number}": self.log_in_on_the_web for number in range(3)},
            "scrape": self.scrape,
        }

    def call(
        self, http: requests.Session, method: str, path: str, token: str = "", status: int = 200, **options: Any
    ) -> Any:
        """Send a request to any instance, and return the data of its response."""
        url = f"{self.deployment.any().url}{path}"
        headers = bearer(token) if token else {}
        answer = until_available(lambda: http.request(method, url, headers=headers, timeout=WAIT_SECONDS, **options))
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text[:200]}"
        return answer.json()["data"] if path.startswith("/api") and status < 300 else answer

    def read(self, http: requests.Session, token: str = "") -> None:
        token = token or self.tokens[0]
        read = self.call(http, "GET", "/api/v1/users/me/personal-data/full", token)
        assert read["phone"] == self.phones[token], "the phone number is another"

    def order(self, http: requests.Session) -> None:
        self.call(http, "POST", "/api/v1/orders", self.tokens[1], 201, json={**ORDER, "remark": "茶" * 200})

    def change_phone(self, http: requests.Session) -> None:
        self.set_phone(http, self.tokens[2])
        self.read(http, self.tokens[2])

    def set_phone(self, http: requests.Session, token: str) -> None:
        phone = f"139{secrets.randbelow(10**8):08}"
        body = {"code": self.simulator.phone_code(phone=phone)}
        self.call(http, "PUT", "/api/v1/users/me/phone", token, json=body)
        self.phones[token] = phone

    def log_in(self, http: requests.Session) -> None:
        """Log in, and use the session."""
        body = {"code": self.simulator.code()}
        answer = self.until_accepted(
            lambda url: http.post(f"{url}/api/v1/auth/wechat", json=body, timeout=WAIT_SECONDS)
        )
        assert answer.status_code == 200, f"login: {answer.text}"
        token = answer.json()["data"]["token"]
        self.set_phone(http, token)
        self.read(http, token)

    def log_in_on_the_web(self, http: requests.Session) -> None:
        """Log in with a browser of its own, whose user takes some seconds to agree."""
        del http
        with Browser() as browser:
            browser.headers["Connection"] = "close"
            begun = browser.get(f"{self.deployment.any().url}/api/v1/auth/wechat/authorize?return_to=/docs")
            assert begun.status_code == 302, f"authorize: {begun.status_code} {begun.text}"
            agreed = urlsplit(self.simulator.sign_in_on_the_web(begun.headers["Location"]))
            self.over.wait(random.uniform(0, 3))
            ended = self.until_accepted(lambda url: browser.get(f"{url}{agreed.path}?{agreed.query}"))
            assert ended.status_code == 302, f"callback: {ended.status_code} {ended.text}"
            me = browser.get(f"{self.deployment.any().url}/api/v1/users/me")
            assert me.status_code == 200, f"me: {me.status_code} {me.text}"

    def until_accepted(self, send: Callable[[str], requests.Response]) -> requests.Response:
        """Send a login again, with the same code, for as long as WeChat does not accept the service's secret."""
        ends = time.monotonic() + WAIT_SECONDS
        while True:
            answer = until_available(lambda: send(self.deployment.any().url))
            if answer.status_code != REFUSED or time.monotonic() > ends:
                return answer
            self.refused += 1
            time.sleep(THINK_SECONDS)

    def scrape(self, http: requests.Session) -> None:
        assert "kuaishang_build_info" in self.call(http, "GET", "/metrics", self.metrics_token).text

    def client(self, kind: str) -> None:
        with requests.Session() as http:
            http.headers["Connection"] = "close"  # a reload closes connections that are kept, maybe just then
            while not self.over.is_set():
                try:
                    self.rounds[kind](http)
                except (AssertionError, requests.RequestException, ValueError) as error:
                    self.failures.append(f"{kind}: {error!r}")
                self.done[kind] += 1
                time.sleep(THINK_SECONDS)

    def go_on(self) -> None:
        """Let each client do something more, from its beginning to its end."""
        before = self.done.copy()
        wait_until(lambda: all(self.done[kind] >= before[kind] + 2 for kind in self.rounds))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run it for as long as the block takes; nothing may have failed."""
        with ThreadPoolExecutor(len(self.rounds)) as pool:
            clients = [pool.submit(self.client, kind) for kind in self.rounds]
            try:
                self.go_on()
                yield
            finally:
                self.over.set()
            for client in clients:
                client.result()
        assert self.failures == []


@pytest.fixture(scope="module")
def wechat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator of these tests' own, whose secret changes."""
    simulator = Simulator(tmp_path_factory.mktemp("wechat") / "output")
    yield simulator
    simulator.process.stop()


@pytest.fixture(scope="module")
def shared_deployment(
    environ: dict[str, str], databases: Databases, wechat: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder, url = tmp_path_factory.mktemp("deployment"), databases.create()
    migrate(url)
    in_file = {name: environ[name] for name in ROTATED}
    different = {"DATABASE_URL": url, "ENV_FILE": str(folder / "settings.env"), "WEB_CONCURRENCY": "1"}
    different |= {"WECHAT_API_BASE_URL": wechat.url, "WECHAT_OPEN_BASE_URL": wechat.url}
    others = {name: value for name, value in environ.items() if name not in ROTATED} | different
    with ExitStack() as stack:

        def start(name: str) -> Service:
            service = Service(others, folder / name)
            stack.callback(service.discard)
            return service

        yield Deployment(folder / "settings.env", in_file, start)


@pytest.fixture
def deployment(shared_deployment: Deployment, wechat: Simulator, journal: Any) -> Deployment:
    """It goes on with the secrets that the tests before have left."""
    wechat.forget()
    journal.secrets |= {NEW_METRICS_TOKEN, NEW_APP_SECRET}
    for service in shared_deployment.services:
        service.clear_log()
        journal.services.append(service)
    return shared_deployment


@pytest.fixture
def load(deployment: Deployment, wechat: Simulator) -> Iterator[Load]:
    load = Load(deployment, wechat)
    with load.running():
        yield load


def new_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()


def test_a_new_secret_key_ends_no_login_on_the_web(deployment: Deployment, load: Load) -> None:
    old, new = deployment.settings["SECRET_KEY"], new_key()
    deployment.change(load, SECRET_KEY_FALLBACKS=new)
    deployment.change(load, SECRET_KEY=new, SECRET_KEY_FALLBACKS=old)
    load.go_on()  # which ends what the old one has signed
    deployment.change(load, SECRET_KEY_FALLBACKS="")


def test_new_encryption_keys_leave_nothing_unreadable(deployment: Deployment, load: Load) -> None:
    old, new = deployment.settings["ENCRYPTION_KEYS"], new_key()
    deployment.change(load, ENCRYPTION_KEYS=f"{old},{new}")
    deployment.change(load, ENCRYPTION_KEYS=f"{new},{old}")
    env = {**deployment.services[0].environ, "FLASK_APP": "deploy.keys"}
    command = [sys.executable, "-m", "flask", "keys", "rotate"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "All is under the first key."), done.stderr
    deployment.change(load, ENCRYPTION_KEYS=new)
    for token in {*load.phones} - {load.tokens[2]}:  # the number of that one changes meanwhile
        load.read(requests.Session(), token)


def test_a_new_metrics_token_fails_no_scrape(deployment: Deployment, load: Load) -> None:
    old = deployment.settings["METRICS_TOKEN"]
    deployment.change(load, METRICS_TOKEN=f"{old},{NEW_METRICS_TOKEN}")
    load.metrics_token = NEW_METRICS_TOKEN
    load.go_on()
    deployment.change(load, METRICS_TOKEN=NEW_METRICS_TOKEN)
    refused = load.call(requests.Session(), "GET", "/metrics", old, 401)
    assert refused.json()["code"] == 401


def test_a_new_wechat_secret_fails_no_login_that_is_sent_again_and_nothing_else(
    deployment: Deployment, load: Load, wechat: Simulator
) -> None:
    """WeChat accepts the old secret no more as soon as it has made a new one."""
    assert load.refused == 0
    wechat.reset_secret(NEW_APP_SECRET)
    wait_until(lambda: load.refused)
    deployment.write(WECHAT_APP_SECRET=NEW_APP_SECRET)
    for service in deployment.services:
        reload(service)
    load.go_on()
    refused = load.refused
    load.go_on()
    assert load.refused == refused


def test_what_opentelemetry_reads_itself_is_read_again(
    start_service: StartService, tmp_path: Path, collector: OtlpReceiver
) -> None:
    file = tmp_path / "settings.env"
    file.touch(0o600)
    service = None
    for name in ("one", "two"):
        of_all = f"OTEL_EXPORTER_OTLP_ENDPOINT={collector.url}\nOTEL_BSP_SCHEDULE_DELAY=100\n"
        file.write_text(f"{of_all}OTEL_SERVICE_NAME={name}\n")
        if service:
            reload(service)
        else:
            service = start_service(ENV_FILE=str(file), WEB_CONCURRENCY="1")
        trace_id = requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).headers["X-Trace-Id"]

        def names() -> set[str]:
            spans = collector.spans()
            return {span.resource["service.name"] for span in spans if span.trace_id == trace_id}  # noqa: B023

        assert wait_until(names) == {name}
