"""gunicorn.conf.py holds what the rest of the service relies on."""

import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gunicorn.util
import pytest
from gunicorn.util import parse_address
from gunicorn.workers.ggevent import GeventWorker

from tests.harness import ROOT


@pytest.fixture
def configure(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr("gevent.monkey.patch_all", lambda: None)  # this process has threads
    # What it changes for its process is undone.
    monkeypatch.setattr("gunicorn.util.write_error", gunicorn.util.write_error)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")

    def run(**different: str) -> dict[str, Any]:
        for name, value in {**environ, **different}.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / "gunicorn.conf.py"))

    return run


@pytest.fixture
def configured(configure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return configure(PORT="9123", WEB_CONCURRENCY="5", WEB_CONNECTIONS="700")


def test_the_settings_of_the_environment_are_used(configured: dict[str, Any]) -> None:
    assert parse_address(configured["bind"]) == ("0.0.0.0", 9123)
    assert (configured["workers"], configured["worker_connections"]) == (5, 700)


@pytest.mark.parametrize(
    ("host", "address"), [("", "0.0.0.0"), ("127.0.0.1", "127.0.0.1"), ("::", "::"), ("::1", "::1")]
)
def test_host_is_the_address_to_listen_on(configure: Callable[..., dict[str, Any]], host: str, address: str) -> None:
    assert parse_address(configure(HOST=host, PORT="9123")["bind"]) == (address, 9123)


def test_requests_run_in_greenlets_and_may_finish_what_they_wait_for(configure: Callable[..., dict[str, Any]]) -> None:
    configured = configure(DRAIN_SECONDS="")
    assert configured["settings"]["DRAIN_SECONDS"] > 0
    assert issubclass(configured["worker_class"], GeventWorker)
    assert configured["graceful_timeout"] > configured["settings"]["REQUEST_SECONDS"]


@pytest.mark.parametrize("seconds", ["", "0", "12"])
def test_a_stop_with_its_drain_is_over_before_platforms_kill(
    configure: Callable[..., dict[str, Any]], seconds: str
) -> None:
    configured = configure(DRAIN_SECONDS=seconds)
    assert configured["graceful_timeout"] > 5
    assert configured["settings"]["DRAIN_SECONDS"] + configured["graceful_timeout"] < 30


def test_load_balancers_close_idle_connections_first(configured: dict[str, Any]) -> None:
    assert configured["keepalive"] > 60


def test_nothing_listens_beside_the_port(configured: dict[str, Any]) -> None:
    assert configured["control_socket_disable"] is True


@pytest.mark.parametrize(("seconds", "reason"), [("1", "status -14"), ("soon", "invalid literal")])
def test_a_trial_that_keeps_to_no_limit_is_ended_and_refuses_the_reload(
    configure: Callable[..., dict[str, Any]], tmp_path: Path, seconds: str, reason: str
) -> None:
    trial = tmp_path / "deploy" / "patch" / "trial.py"
    trial.parent.mkdir(parents=True)
    trial.write_text("import time; time.sleep(60)")
    server = MagicMock()
    server.cfg.chdir, server.LISTENERS[0].getsockname.return_value = tmp_path, ("127.0.0.1", 1)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}
    try:
        configure(START_SECONDS=seconds)["reload_what_serves"](server)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ((said, why), _) = server.log.error.call_args
    assert reason in said % why
    server.reload.assert_not_called()
