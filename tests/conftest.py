"""The fixtures: a private Redis, the WeChat simulator over HTTP, a migrated database, and the service.

`--database=mariadb` puts MariaDB in SQLite's place, and runs only the tests that prove something about it: those of
storage and blueprints that need a database, those with `own_databases`, and those marked `database`.
"""

import base64
import io
import json
import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient
from hypothesis import settings
from pymysql.err import OperationalError
from redis import Redis

import wechat
from dev.redis_server import RedisServer
from service import create_app
from storage import database, message_queue
from telemetry.logs import JsonLineFormatter, LineHandler
from tests.databases import Databases, MariaDB, SQLiteFiles
from tests.harness import (
    APP_ID,
    APP_SECRET,
    METRICS_TOKEN,
    PERSON,
    PUSH_AES_KEY,
    PUSH_TOKEN,
    ROOT,
    WAIT_SECONDS,
    WEB_APP_ID,
    WEB_APP_SECRET,
    Service,
    Simulator,
    bound_to_this_process,
    migrate,
)
from tests.otlp_receiver import OtlpReceiver

SECRETS = {APP_SECRET, WEB_APP_SECRET, PUSH_TOKEN, PUSH_AES_KEY, METRICS_TOKEN}


class LinesInMemory(LineHandler):
    """Writes lines into a stream as they come."""

    def __init__(self, stream: io.StringIO) -> None:
        super().__init__(JsonLineFormatter("here:8000", "0"))
        self.stream = stream

    def start(self) -> None:
        """Need no thread."""

    def put(self, source: str, encode: Callable[..., str], *args: Any) -> None:
        self.stream.write(f"{encode(*args)}\n")

    def flush(self) -> None:
        """Have nothing that waits."""


class Journal:
    """What the service has logged, in this process and in others, what it sent of spans, and what it must not have."""

    def __init__(self) -> None:
        self.in_process = io.StringIO()
        self.services: list[Service] = []
        self.collectors: list[OtlpReceiver] = []
        self.secrets: set[str] = set()

    def read_token(self, response: Response) -> Response:
        """Remember the token that somebody is given by the application in this process."""
        if response.is_streamed:
            return response
        answer = response.get_json(silent=True)
        if isinstance(answer, dict) and isinstance(answer.get("data"), dict):
            self.secrets.add(str(answer["data"].get("token", "")))
        return response

    def text(self) -> str:
        self.secrets.update(token for service in self.services for token in service.tokens)
        spans = "".join(body.decode(errors="replace") for collector in self.collectors for body in collector.bodies)
        return self.in_process.getvalue() + "".join(service.log() for service in self.services) + spans


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--database", choices=("sqlite", "mariadb"), default="sqlite", help="the database to run the tests on"
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ["ENV_FILE"] = os.devnull
    settings.load_profile("ci")  # without time limits, and each run has the same input
    config.addinivalue_line("markers", "only_on(database): this test is about one database, and skipped on the other")
    config.addinivalue_line("markers", "database: this test runs on each database, outside of the folders that do")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the tests for this database."""
    database = config.getoption("database")
    if database == "mariadb":
        others = [item for item in items if not _is_about_the_database(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_about_the_database(item)]
    for item in items:
        only_on = item.get_closest_marker("only_on")
        if only_on and only_on.args[0] != database:
            item.add_marker(pytest.mark.skip(reason=f"only for {only_on.args[0]}"))


def _is_about_the_database(item: pytest.Item) -> bool:
    marked = item.get_closest_marker("database") or item.get_closest_marker("only_on")
    folder = item.path.parent
    in_a_folder = folder in (ROOT / "tests/storage", ROOT / "tests/blueprints")
    fixtures = set(getattr(item, "fixturenames", ()))
    return bool(marked or "own_databases" in fixtures or (in_a_folder and "databases" in fixtures))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with closing(RedisServer(tmp_path_factory.mktemp("redis"), bound_to_this_process())) as server:
        server.start()
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for this test alone, which may stop it or make it hang."""
    with closing(RedisServer(tmp_path / "redis", bound_to_this_process())) as server:
        server.start()
        yield server
        if server.process:
            server.process.send_signal(signal.SIGCONT)


@pytest.fixture
def patient_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many at once the last one waits for SQLite as long as a busy machine takes."""
    monkeypatch.setattr(database, "STATEMENT_SECONDS", WAIT_SECONDS)


@pytest.fixture(scope="session")
def shared_simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    simulator = Simulator(tmp_path_factory.mktemp("simulator") / "output")
    yield simulator
    simulator.process.stop()


@pytest.fixture
def simulator(shared_simulator: Simulator) -> Simulator:
    """The simulator, without codes, faults or calls of earlier tests."""
    shared_simulator.forget()
    return shared_simulator


@pytest.fixture(scope="session")
def databases(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Creates databases of the kind that the tests run on; at the end no personal data is in its files."""
    databases = None
    for databases in _databases(pytestconfig, tmp_path_factory.mktemp("databases")):
        yield databases
    assert databases is not None
    at_rest = databases.at_rest()
    assert [name for name, value in PERSON.items() if value.encode() in at_rest] == []


@pytest.fixture
def own_databases(pytestconfig: pytest.Config, tmp_path: Path) -> Iterator[Databases]:
    """The same for this test alone, which may stop or kill the server."""
    yield from _databases(pytestconfig, tmp_path / "databases")


def _databases(config: pytest.Config, folder: Path) -> Iterator[Databases]:
    kind = {"sqlite": SQLiteFiles, "mariadb": MariaDB}[config.getoption("database")]
    with closing(kind(folder)) as databases:
        databases.start()
        yield databases


@pytest.fixture(scope="session")
def environ(redis_server: RedisServer, shared_simulator: Simulator, databases: Databases) -> dict[str, str]:
    """A complete environment for the service, its database migrated."""
    database_url = databases.create()
    migrate(database_url)
    return {
        "ENV_FILE": os.devnull,  # whatever is beside the code
        "WECHAT_APP_ID": APP_ID,
        "WECHAT_APP_SECRET": APP_SECRET,
        "WECHAT_API_BASE_URL": shared_simulator.url,
        "WECHAT_OPEN_BASE_URL": shared_simulator.url,
        "WECHAT_ACCOUNT_APP_ID": WEB_APP_ID,
        "WECHAT_ACCOUNT_APP_SECRET": WEB_APP_SECRET,
        "WECHAT_PUSH_TOKEN": PUSH_TOKEN,
        "WECHAT_PUSH_AES_KEY": PUSH_AES_KEY,
        # A busy machine may take longer than the service allows Redis; tests with `own_redis` keep that limit.
        "REDIS_URL": f"{redis_server.url}?socket_timeout=10&socket_connect_timeout=10",
        "DATABASE_URL": database_url,
        "SECRET_KEY": secrets.token_hex(32),
        "ENCRYPTION_KEYS": base64.b64encode(secrets.token_bytes(32)).decode(),
        "DRAIN_SECONDS": "0",  # there is no load balancer to notice a stop
        "DOCS": "1",
        "METRICS_TOKEN": METRICS_TOKEN,
        **dict.fromkeys(("LOGIN_RATE", "APP_LOGIN_RATE", "SESSION_RATE"), "off"),  # all tests are one client
        "LOG_LEVEL": "DEBUG",  # for `journal`
    }


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    """The service's Redis, empty."""
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this test's messages in a stream of their own: services of other tests, on this Redis, would take them."""
    monkeypatch.setattr(message_queue, "STREAM", "messages of this test")


@pytest.fixture
def make_app(
    environ: dict[str, str], redis: Redis, journal: Journal, own_stream: None
) -> Iterator[Callable[..., Flask]]:
    """Create applications, with these settings changed from the usual ones."""
    with ExitStack() as stack:

        def make(**different: str) -> Flask:
            app = create_app({**environ, **different})
            app.after_request(journal.read_token)
            stack.callback(app.extensions["database"].dispose)
            stack.callback(app.extensions["wechat"].transport._adapter.close)
            stack.callback(app.extensions["redis"].close)
            for limit in app.extensions["rate_limits"].values():
                stack.callback(limit._settler.shutdown)  # so that it writes nothing into the next test's Redis
            return app

        yield make


@pytest.fixture(scope="session")
def shared_app(environ: dict[str, str]) -> Iterator[Flask]:
    app = create_app(environ)
    app.after_request(lambda response: app.extensions["journal"].read_token(response))
    yield app
    app.extensions["database"].dispose()  # or Python 3.13 warns of connections that nobody has closed


@pytest.fixture
def app(shared_app: Flask, redis: Redis, journal: Journal, own_stream: None) -> Iterator[Flask]:
    """One application for all tests, as making one takes longer than most of them; `make_app` makes more.

    What it remembers outside of Redis and the database is made anew.
    """
    shared_app.extensions["journal"] = journal
    wechat.init_app(shared_app)
    yield shared_app
    for limit in shared_app.extensions["rate_limits"].values():
        limit._settler.submit(int).result()  # what is due is settled, so nothing gets into the next test
    shared_app.extensions["wechat"].transport._adapter.close()


@pytest.fixture
def lose_commit(app: Flask, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Let the next COMMIT on MariaDB fail with this error, whether or not it is done."""
    dialect = app.extensions["database"].dialect
    commit = dialect.do_commit

    def lose(number: int, is_done: bool) -> None:
        def fail(connection: Any) -> None:
            monkeypatch.setattr(dialect, "do_commit", commit)
            (commit if is_done else dialect.do_rollback)(connection)
            raise OperationalError(number, "lost")

        monkeypatch.setattr(dialect, "do_commit", fail)

    return lose


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A client of the application in this process, without cookies, as wx.request has none."""
    return app.test_client(use_cookies=False)


@pytest.fixture
def token(client: FlaskClient, simulator: Simulator) -> str:
    """The token of a new user who has just logged in."""
    return client.post("/api/v1/auth/wechat", json={"code": simulator.code()}).get_json()["data"]["token"]


@pytest.fixture(scope="session", autouse=True)
def _no_lines_on_stdout() -> Iterator[None]:
    """The application in this process writes where `journal` reads; test_service.py has stdout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("telemetry.logs.configure", lambda *args: None)
        yield


@pytest.fixture(autouse=True)
def journal(request: pytest.FixtureRequest) -> Iterator[Journal]:
    """All that is logged meanwhile, at any level; in the end no secret that was used is in it."""
    journal = Journal()
    handler = LinesInMemory(journal.in_process)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield journal
    root.setLevel(level)
    root.removeHandler(handler)
    if "environ" in request.fixturenames:
        simulator = request.getfixturevalue("shared_simulator")
        journal.secrets |= {*PERSON.values(), *SECRETS, *simulator.secrets()}
        text = journal.text()
        assert [secret for secret in journal.secrets if len(secret) > 5 and secret in text] == []


@pytest.fixture
def log_lines(app: Flask, journal: Journal) -> Callable[[], list[dict[str, Any]]]:
    """What the application in this process logs from now on, as the lines would be written."""
    journal.in_process.truncate(0)
    journal.in_process.seek(0)
    return lambda: [json.loads(line) for line in journal.in_process.getvalue().splitlines()]


@pytest.fixture
def collector(journal: Journal) -> Iterator[OtlpReceiver]:
    """Takes spans."""
    collector = OtlpReceiver()
    journal.collectors.append(collector)
    yield collector
    collector.close()


@pytest.fixture
def start_service(
    environ: dict[str, str], redis: Redis, tmp_path: Path, journal: Journal
) -> Iterator[Callable[..., Service]]:
    """Start services, with these settings changed from the usual ones."""
    with ExitStack() as stack:

        def start(module: str = "wsgi", within: Sequence[str] = (), **different: str) -> Service:
            output = tmp_path / f"output-{secrets.token_hex(4)}"
            service = Service({**environ, **different}, output, module, within)
            journal.services.append(service)
            stack.callback(service.discard)  # an orderly stop takes almost as long as the start
            return service

        yield start


@pytest.fixture(scope="session")
def shared_services(
    environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Service]]:
    folder = tmp_path_factory.mktemp("services")
    with ExitStack() as stack:
        one = Service(environ, folder / "one")
        stack.callback(one.discard)
        other = Service(environ, folder / "other")
        stack.callback(other.discard)
        yield one, other


@pytest.fixture
def services(shared_services: tuple[Service, Service], redis: Redis, journal: Journal) -> tuple[Service, Service]:
    """Two instances with the usual settings. Other tests use them too: leave them running."""
    for service in shared_services:
        service.clear_log()
        journal.services.append(service)
    return shared_services
