import gc
import warnings
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from sqlalchemy import make_url, text
from sqlalchemy.orm import Session

from dev.redis_server import RedisServer
from service import create_app
from storage import database
from telemetry.metrics import REGISTRY
from tests.databases import Databases, MariaDB
from tests.harness import (
    WAIT_SECONDS,
    Service,
    Simulator,
    bearer,
    bound_to_this_process,
    free_port,
    migrate,
    wait_until,
)
from wechat.transport import FAILURES


def up(dependency: str) -> float | None:
    return REGISTRY.get_sample_value("kuaishang_dependency_up", {"dependency": dependency})


def test_the_probes_respond(client: FlaskClient) -> None:
    assert client.get("/livez").get_json()["data"] == {}
    assert client.get("/readyz").get_json()["data"] == {"redis": "up", "database": "up", "wechat": "up"}
    assert (up("redis"), up("database")) == (1, 1)
    found = client.get("/version").get_json()["data"]
    assert f"{found['version']}+{found['commit']}" == client.application.config["VERSION"]
    started = datetime.fromisoformat(found["started"])
    assert started.utcoffset() == timedelta(0)
    assert found["built"] == found["started"]  # as there is no release.json
    assert timedelta(0) < datetime.now(UTC) - started < timedelta(hours=2)


def test_readiness_says_that_wechat_keeps_failing_and_is_200(client: FlaskClient, simulator: Simulator) -> None:
    simulator.fault("http_500", times=FAILURES)
    for _ in range(FAILURES):
        client.post("/api/v1/auth/wechat", json={"code": simulator.code()})
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["data"]["wechat"]) == (200, "down")


@pytest.mark.parametrize("away", ["redis", "database"])
def test_readiness_names_a_failing_dependency_and_liveness_checks_none(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    nowhere = {"redis": f"unix://{tmp_path}/nobody.sock", "database": f"sqlite:///{tmp_path}/no/such/folder.db"}
    app = create_app({**environ, f"{away.upper()}_URL": nowhere[away]})
    client = app.test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["code"]) == (503, 503)
    why = {"redis": "Refuses connections.", "database": "Unknown database."}
    assert answer.get_json()["data"]["errors"] == {away: [why[away]]}
    assert (up("redis"), up("database")) == (away != "redis", away != "database")
    assert "Retry-After" in answer.headers
    monkeypatch.setattr(Session, "execute", lambda *_: pytest.fail("asked the database"))
    monkeypatch.setattr(Redis, "execute_command", lambda *_: pytest.fail("asked Redis"))
    assert client.get("/livez", headers=bearer("some-token")).status_code == 200
    monkeypatch.undo()
    app.extensions["redis"].close()
    app.extensions["database"].dispose()


def test_a_database_without_the_latest_migration_is_not_ready(
    make_app: Callable[..., Flask], databases: Databases
) -> None:
    url = databases.create()
    client = make_app(DATABASE_URL=url).test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["data"]) == (503, {"errors": {"database": ["Not migrated."]}})
    assert up("database") == 0
    migrate(url)
    assert client.get("/readyz").status_code == 200
    assert up("database") == 1
    engine = database.engine_for(url)
    with engine.begin() as connection:  # as before a migration that adds a column
        connection.execute(text("ALTER TABLE users DROP COLUMN blocked"))
    engine.dispose()
    assert client.get("/readyz").get_json()["data"] == {"errors": {"database": ["Not migrated."]}}


def reason(make_app: Callable[..., Flask], **settings: str) -> object:
    """What /readyz says of the one dependency that fails."""
    answer = make_app(**settings).test_client().get("/readyz")
    if answer.status_code == 200:
        return None
    ((said,),) = answer.get_json()["data"]["errors"].values()
    return said


@pytest.mark.parametrize(
    ("commands", "url", "said"),
    [
        ([("REPLICAOF", "127.0.0.1", "1")], "unix://{}", "Read-only."),
        ([("CONFIG", "SET", "min-replicas-to-write", "1")], "unix://{}", "Refuses writes."),
        ([("CONFIG", "SET", "maxmemory", "1")], "unix://{}", "Out of memory or space."),
        ([("CONFIG", "SET", "requirepass", "right")], "unix://:wr0ngpass@{}", "Wrong user or password."),
        ([("CONFIG", "SET", "requirepass", "right")], "unix://{}", "Wrong user or password."),
        (
            [("ACL", "SETUSER", "reader", "on", ">wr0ngpass", "~*", "+@all", "-set")],
            "unix://reader:wr0ngpass@{}",
            "No permission.",
        ),
        ([], "unix://{}?db=99", "Unknown database."),
        ([], "redis://no-such-host.invalid", "Unknown host."),
        ([], "redis://127.0.0.1:1", "Refuses connections."),
    ],
)
def test_readiness_says_why_redis_cannot_be_used(
    make_app: Callable[..., Flask],
    own_redis: RedisServer,
    log_lines: Any,
    commands: list[tuple[str, ...]],
    url: str,
    said: str,
) -> None:
    with Redis.from_url(own_redis.url) as administrator:
        for words in commands:
            administrator.execute_command(*words)
        assert reason(make_app, REDIS_URL=url.format(own_redis.socket)) == said
    assert "wr0ngpass" not in str(log_lines())


def test_readiness_names_a_redis_cluster(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    options = {"cluster-enabled": "yes", "cluster-config-file": "nodes.conf", "port": str(free_port())}
    with closing(RedisServer(tmp_path / "cluster", bound_to_this_process(), **options)) as server:
        server.start()
        assert reason(make_app, REDIS_URL=server.url) == "Is a Redis Cluster."  # without slots
        with Redis.from_url(server.url) as administrator:
            administrator.execute_command("CLUSTER", "ADDSLOTS", *map(str, range(16384)))
            wait_until(lambda: b"cluster_state:ok" in administrator.execute_command("CLUSTER", "INFO"))
        assert reason(make_app, REDIS_URL=server.url) == "Is a Redis Cluster."  # with all of them


def test_a_redis_cluster_is_refused_at_the_start(start_service: Callable[..., Service], tmp_path: Path) -> None:
    options = {"cluster-enabled": "yes", "cluster-config-file": "nodes.conf", "port": str(free_port())}
    with closing(RedisServer(tmp_path / "cluster", bound_to_this_process(), **options)) as server:
        server.start()
        with pytest.raises(AssertionError, match="ended instead of starting"):
            start_service(REDIS_URL=server.url)
    (output,) = tmp_path.glob("output-*[0-9a-f]")
    assert "REDIS_URL names a Redis Cluster: use a single Redis, or Sentinel" in output.read_text()


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize(
    ("privileges", "address", "said"),
    [
        ("ALL ON {}.*", "app:app-password@localhost/{}", None),
        ("ALL ON {}.*", "app:wr0ngpass@localhost/{}", "Wrong user or password."),
        ("ALL ON {}.*", "root@localhost/absent", "Unknown database."),
        ("USAGE ON *.*", "app:app-password@localhost/{}", "No permission."),
        ("SELECT ON {}.*", "app:app-password@localhost/{}", "No permission."),
        ("ALL ON {}.*", "app:app-password@no-such-host.invalid/{}", "Unknown host."),
        ("ALL ON {}.*", "app:app-password@127.0.0.1:1/{}", "Refuses connections."),
    ],
)
def test_readiness_says_why_mariadb_cannot_be_used(
    make_app: Callable[..., Flask],
    own_databases: MariaDB,
    log_lines: Any,
    privileges: str,
    address: str,
    said: str | None,
) -> None:
    url = make_url(own_databases.create())
    migrate(url.render_as_string())
    own_databases.execute("CREATE USER app@localhost IDENTIFIED BY 'app-password'")
    own_databases.execute(f"GRANT {privileges.format(url.database)} TO app@localhost")
    socket = f"?unix_socket={own_databases.socket}" if "localhost" in address else ""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # of PyMySQL, where it cannot connect
        assert reason(make_app, DATABASE_URL=f"mysql://{address.format(url.database)}{socket}") == said
        gc.collect()
    assert "wr0ngpass" not in str(log_lines())


@pytest.mark.only_on("sqlite")
def test_readiness_notices_a_file_that_takes_no_writes(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        assert client.get("/readyz").get_json()["data"] == {"errors": {"database": ["Read-only."]}}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    assert client.get("/readyz").get_json()["data"] == {"errors": {"database": ["Out of memory or space."]}}


def test_a_check_that_takes_longer_than_a_second_fails(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.redis_client.ping", lambda: gevent.sleep(WAIT_SECONDS))  # and then succeeds
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["data"]) == (503, {"errors": {"redis": ["Does not respond."]}})


def test_a_bug_in_a_check_is_503_and_logged(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, log_lines: Any
) -> None:
    monkeypatch.setattr("storage.database.ping", lambda: {}["mistake"])
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["data"]) == (503, {"errors": {"database": ["Fails: see the log."]}})
    (line,) = [line for line in log_lines() if line["level"] == "ERROR"]
    assert line["reason"] == "KeyError: 'mistake'"
