from pathlib import Path

import pytest
from flask.testing import FlaskClient
from redis import Redis
from sqlalchemy.orm import Session

import service
from service import create_app
from tests.harness import bearer


def test_the_probes_answer(client: FlaskClient) -> None:
    assert client.get("/livez").get_json()["data"] == {}
    assert client.get("/readyz").get_json()["data"] == {"redis": "up", "database": "up"}
    assert client.get("/version").get_json()["data"] == {"version": service.VERSION}


@pytest.mark.parametrize("away", ["redis", "database"])
def test_readiness_names_what_is_down_and_liveness_touches_nothing(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    nowhere = {"redis": f"unix://{tmp_path}/nobody.sock", "database": f"sqlite:///{tmp_path}/no/such/folder.db"}
    app = create_app({**environ, f"{away.upper()}_URL": nowhere[away]})
    client = app.test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["code"]) == (503, 503)
    assert list(answer.get_json()["data"]["errors"]) == [away]
    assert "Retry-After" in answer.headers
    monkeypatch.setattr(Session, "execute", lambda *_: pytest.fail("asked the database"))
    monkeypatch.setattr(Redis, "execute_command", lambda *_: pytest.fail("asked Redis"))
    assert client.get("/livez", headers=bearer("some-token")).status_code == 200
    monkeypatch.undo()
    app.extensions["redis"].close()
    app.extensions["database"].dispose()
