"""gunicorn.conf.py holds what the rest of the service relies on."""

import runpy
from typing import Any

import pytest

from tests.harness import ROOT
from wechat.transport import PATIENCE_SECONDS


@pytest.fixture
def configured(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name, value in {**environ, "PORT": "9123", "WEB_CONCURRENCY": "5", "WEB_THREADS": "7"}.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(ROOT / "gunicorn.conf.py"))


def test_the_settings_of_the_environment_are_used(configured: dict[str, Any]) -> None:
    assert configured["bind"] == "0.0.0.0:9123"
    assert (configured["workers"], configured["threads"]) == (5, 7)


def test_requests_run_in_threads_and_may_finish_what_they_wait_for(configured: dict[str, Any]) -> None:
    assert configured["worker_class"] == "gthread"
    assert PATIENCE_SECONDS < configured["graceful_timeout"] < 30


def test_load_balancers_close_idle_connections_first(configured: dict[str, Any]) -> None:
    assert configured["keepalive"] > 60


def test_nothing_listens_beside_the_port(configured: dict[str, Any]) -> None:
    assert configured["control_socket_disable"] is True
