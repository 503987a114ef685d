import signal
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import settings
from dev.redis_server import RedisServer
from tests.harness import METRICS_TOKEN, bearer, suspend, wait_until

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"  # as Prometheus says it


def test_whoever_brings_the_token_reads_the_metrics(client: FlaskClient) -> None:
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
        assert read["kuaishang_build_info", settings.VERSION] == 1
        assert read["kuaishang_http_requests_total", "/version", "200", "200", "GET"] > 0
        assert read["kuaishang_start_time_seconds",] > 1.7e9
        assert "X-Trace-Id" in answer.headers


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {METRICS_TOKEN}x",
        f"Bearer {METRICS_TOKEN[:-1]}",
        f"Basic {METRICS_TOKEN}",
        METRICS_TOKEN,
        "Bearer 密".encode().decode("latin-1"),
    ],
)
def test_nobody_else_reads_them(client: FlaskClient, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for method in ("GET", "HEAD", "OPTIONS"):
        answer = client.open("/metrics", method=method, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    answer = client.get("/metrics", headers=headers).get_json()
    assert (answer["code"], answer["data"]) == (401, None)


def test_the_token_of_a_session_opens_nothing(client: FlaskClient, token: str) -> None:
    assert client.get("/metrics", headers=bearer(token)).status_code == 401


@pytest.mark.parametrize("headers", [{}, bearer(""), bearer("wrong")])
def test_without_a_token_in_the_settings_it_is_as_if_they_were_not_there(
    make_app: Callable[..., Flask], headers: dict[str, str]
) -> None:
    client = make_app(METRICS_TOKEN="").test_client()
    answer, nowhere = client.get("/metrics", headers=headers), client.get("/nowhere", headers=headers)
    assert (answer.status_code, answer.get_json()) == (404, nowhere.get_json())


def test_a_scrape_asks_anew_who_is_up_and_no_session(make_app: Callable[..., Flask], own_redis: RedisServer) -> None:
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
