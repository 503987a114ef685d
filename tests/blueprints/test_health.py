import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from sqlalchemy.orm import Session

import settings
from service import create_app
from telemetry.metrics import REGISTRY
from tests.databases import Databases
from tests.harness import WAIT_SECONDS, bearer, migrate


def up(dependency: str) -> float | None:
    return REGISTRY.get_sample_value("kuaishang_dependency_up", {"dependency": dependency})


def test_the_probes_respond(client: FlaskClient) -> None:
    assert client.get("/livez").get_json()["data"] == {}
    assert client.get("/readyz").get_json()["data"] == {"redis": "up", "database": "up"}
    assert (up("redis"), up("database")) == (1, 1)
    assert client.get("/version").get_json()["data"] == {"version": settings.VERSION}


@pytest.mark.parametrize("away", ["redis", "database"])
def test_readiness_names_a_failing_dependency_and_liveness_checks_none(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    nowhere = {"redis": f"unix://{tmp_path}/nobody.sock", "database": f"sqlite:///{tmp_path}/no/such/folder.db"}
    app = create_app({**environ, f"{away.upper()}_URL": nowhere[away]})
    client = app.test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["code"]) == (503, 503)
    assert answer.get_json()["data"]["errors"] == {away: ["Does not respond."]}
    assert (up("redis"), up("database")) == (away != "redis", away != "database")
    assert "Retry-After" in answer.headers
    monkeypatch.setattr(Session, "execute", lambda *_: pytest.fail("asked the database"))
    monkeypatch.setattr(Redis, "execute_command", lambda *_: pytest.fail("asked Redis"))
    assert client.get("/livez", headers=bearer("some-token")).status_code == 200
    monkeypatch.undo()
    app.extensions["redis"].close()
    app.extensions["database"].dispose()


@pytest.mark.parametrize("revision", [None, "0003"])
def test_a_database_without_the_latest_migration_is_not_ready(
    make_app: Callable[..., Flask], databases: Databases, revision: str | None
) -> None:
    url = databases.create()
    if revision:
        migrate(url, "upgrade", revision)
    client = make_app(DATABASE_URL=url).test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["data"]) == (503, {"errors": {"database": ["Not migrated."]}})
    assert up("database") == 0
    migrate(url)
    assert client.get("/readyz").status_code == 200
    assert up("database") == 1


def test_a_check_that_takes_longer_than_a_second_fails(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("storage.redis_client.ping", lambda: over.wait(WAIT_SECONDS))  # and then succeeds
    answer = client.get("/readyz")
    over.set()
    assert (answer.status_code, answer.get_json()["data"]) == (503, {"errors": {"redis": ["Does not respond."]}})


def test_a_bug_in_a_check_is_500(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.database.ping", lambda: {}["mistake"])
    assert client.get("/readyz").status_code == 500
