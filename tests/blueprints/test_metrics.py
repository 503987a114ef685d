import signal
import socket
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from dev.redis_server import RedisServer
from tests.harness import METRICS_TOKEN, bearer, suspend, wait_until

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"  # of Prometheus


def test_the_token_reads_the_metrics(client: FlaskClient) -> None:
    client.get("/version")
    for accept, kind, parse in (
        ("", "text/plain; version=0.0.4; charset=utf-8", parse_text),
        (
            OPENMETRICS,
            "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores",
            parse_openmetrics,
        ),
    ):
        answer = client.get("/metrics", headers={**bearer(METRICS_TOKEN), "Accept": accept})
        assert (answer.status_code, answer.content_type) == (200, kind)
        read = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in parse(answer.text)
            for sample in family.samples
        }
        version = client.application.config["VERSION"]
        assert read["kuaishang_build_info", version, f"{socket.gethostname()}:8000"] == 1
        assert read["kuaishang_http_requests_total", "/version", "200", "200", "GET"] > 0
        assert "X-Trace-Id" in answer.headers


def test_each_of_several_tokens_reads_the_metrics(make_app: Callable[..., Flask]) -> None:
    client = make_app(METRICS_TOKEN=f"{METRICS_TOKEN} , {'n' * 16}").test_client()
    for token, status in ((METRICS_TOKEN, 200), ("n" * 16, 200), (f"{METRICS_TOKEN} , {'n' * 16}", 401), ("", 401)):
        assert client.get("/metrics", headers=bearer(token)).status_code == status


def test_anything_but_the_token_is_401(client: FlaskClient, token: str) -> None:
    for authorization in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {token}",  # of a session
        f"Bearer {METRICS_TOKEN}x",
        f"Bearer {METRICS_TOKEN[:-1]}",
        f"Basic {METRICS_TOKEN}",
        METRICS_TOKEN,
        "Bearer 密".encode().decode("latin-1"),
    ):
        headers = {} if authorization is None else {"Authorization": authorization}
        for method in ("GET", "HEAD"):
            answer = client.open("/metrics", method=method, headers=headers)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), authorization
        answer = client.get("/metrics", headers=headers)
        assert (answer.get_json()["code"], answer.get_json()["data"]) == (401, None)


@pytest.mark.parametrize("headers", [{}, bearer(""), bearer("wrong")])
def test_without_a_token_in_the_settings_the_route_is_404(
    make_app: Callable[..., Flask], headers: dict[str, str]
) -> None:
    client = make_app(METRICS_TOKEN="").test_client()
    answer, nowhere = client.get("/metrics", headers=headers), client.get("/nowhere", headers=headers)
    assert (answer.status_code, answer.get_json()) == (404, nowhere.get_json())


def test_each_scrape_checks_the_dependencies_without_a_session(
    make_app: Callable[..., Flask], own_redis: RedisServer
) -> None:
    client = make_app(REDIS_URL=own_redis.url).test_client()

    def up() -> list[str]:
        answer = client.get("/metrics", headers=bearer(METRICS_TOKEN))
        assert answer.status_code == 200
        assert "Set-Cookie" not in answer.headers
        return [line for line in answer.text.splitlines() if line.startswith("kuaishang_dependency_up")]

    database = 'kuaishang_dependency_up{dependency="database"} 1.0'
    assert up() == ['kuaishang_dependency_up{dependency="redis"} 1.0', database]
    assert own_redis.process
    suspend(own_redis.process)
    assert up() == ['kuaishang_dependency_up{dependency="redis"} 0.0', database]
    own_redis.process.send_signal(signal.SIGCONT)
    wait_until(lambda: up() == ['kuaishang_dependency_up{dependency="redis"} 1.0', database])
