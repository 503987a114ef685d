"""HAProxy as deploy/haproxy configures it, in front of two stand-ins, and the script that takes one of them out."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

import settings
from blueprints.health import CHECK_SECONDS
from errors import Code
from tests.deploy.load_balancers import HAPROXY, HAProxy, Instance
from tests.deploy.test_load_balancers import assert_is_its_own
from tests.deploy.test_prometheus import OF_HAPROXY
from tests.harness import ROOT, WAIT_SECONDS, wait_until

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")

FOLDER = ROOT / "deploy" / "haproxy"
MALFORMED = {
    "no HTTP": ["hello"],
    "headers that are too long": ["GET / HTTP/1.1", "Host: x", f"X-Long: {'x' * 70_000}"],
    "a transfer coding that is unknown": ["POST / HTTP/1.1", "Host: x", "Transfer-Encoding: x"],
    "two lengths": ["POST / HTTP/1.1", "Host: x", "Content-Length: 1", "Content-Length: 2"],
}


@pytest.fixture
def haproxy(instances: list[Instance], tmp_path: Path) -> Iterator[HAProxy]:
    """It asks for /readyz every 100 ms."""
    servers = {f"web-{number}": instance.address for number, instance in enumerate(instances, 1)}
    haproxy = HAProxy(tmp_path, servers, different=HAProxy.checks_every("100ms"))
    wait_until(lambda: all(instance.probes for instance in instances))
    yield haproxy
    haproxy.discard()


def test_haproxy_has_no_doubt_about_its_configuration(haproxy: HAProxy) -> None:
    checked = subprocess.run([*haproxy.command[:1], "-c", "-dW", *haproxy.command[2:]], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_a_stopping_instance_still_serves_until_haproxy_has_noticed() -> None:
    text, readme = (FOLDER / "haproxy.cfg").read_text(), (FOLDER / "README.md").read_text()
    [times] = re.findall(r"default-server inter (\d+)s fastinter (\d+)s downinter \d+s fall (\d+) rise 2 ", text)
    [drain] = re.findall(r"`DRAIN_SECONDS=(\d+)`", readme)
    inter, fastinter, fall = map(int, times)
    assert inter + (fall - 1) * fastinter + fall * CHECK_SECONDS < int(drain)
    assert settings.Settings(only=["DRAIN_SECONDS"]).load({"DRAIN_SECONDS": drain})


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_reaches_no_instance(haproxy: HAProxy, instances: list[Instance], name: str) -> None:
    response, body = haproxy.send(*MALFORMED[name])
    assert (response.status, body[:6]) == (400, b"<html>")  # which no setting changes
    assert [instance.came for instance in instances] == [[], []]


def test_a_slow_body_is_refused_in_the_envelope(instances: list[Instance], tmp_path: Path) -> None:
    haproxy = HAProxy(tmp_path, {"web-1": instances[0].address}, different=HAProxy.waits_for_clients("200ms"))
    try:
        with haproxy.connect() as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            response, body = haproxy.read(connection)
        assert response.status == 400
        assert_is_its_own(400, response.headers, body)
    finally:
        haproxy.discard()


def test_an_instance_is_out_after_three_checks_and_back_after_two(haproxy: HAProxy, instances: list[Instance]) -> None:
    stopping, other = instances
    assert haproxy.statistics()["kuaishang", "web-1"]["weight"] == "100"
    stopping.probes.clear()
    stopping.is_ready = False
    wait_until(lambda: not haproxy.is_up("web-1"))
    assert stopping.probes.count(503) >= 3
    assert {haproxy.request("POST", "/").status_code for _ in range(4)} == {200}
    assert (stopping.came, len(other.came)) == ([], 4)
    stopping.probes.clear()
    stopping.is_ready = True
    wait_until(lambda: haproxy.is_up("web-1"))
    assert stopping.probes.count(200) >= 2
    assert int(haproxy.statistics()["kuaishang", "web-1"]["weight"]) < 100  # slowly, as it is cold


def test_a_check_that_fails_once_takes_nobody_out(haproxy: HAProxy, instances: list[Instance]) -> None:
    instances[0].probes.clear()
    instances[0].fails = 1
    wait_until(lambda: instances[0].probes[-1:] == [200] and 503 in instances[0].probes)
    assert haproxy.statistics()["kuaishang", "web-1"]["chkdown"] == "0"


def test_if_no_instance_is_ready_all_are_asked_and_the_plain_port_says_so(
    haproxy: HAProxy, instances: list[Instance]
) -> None:
    def readiness() -> requests.Response:
        return requests.get(f"{haproxy.plain_url}/readyz", timeout=WAIT_SECONDS)

    answer, success = readiness(), {"code": 200, "message": Code.SUCCESS.message.chinese, "data": {}}
    assert (answer.status_code, answer.json()) == (200, success)
    assert answer.headers["Content-Type"] == "application/json"
    for instance in instances:
        instance.is_ready = False
    wait_until(lambda: not haproxy.is_up("web-1") and not haproxy.is_up("web-2"))
    answer = readiness()
    assert answer.status_code == 503
    assert_is_its_own(503, answer.headers, answer.content)
    assert {haproxy.request("GET", "/").status_code for _ in range(4)} == {200}
    instances[0].kill()
    assert {haproxy.request("POST", "/").status_code for _ in range(4)} == {200}
    instances[1].kill()
    answer = haproxy.request("GET", "/")
    assert answer.status_code == 503
    assert_is_its_own(503, answer.headers, answer.content)


def test_a_hung_instance_costs_no_more_time_than_its_caller_asked_for(
    haproxy: HAProxy, instances: list[Instance]
) -> None:
    instances[0].may_answer.clear()
    began = time.monotonic()
    answers = [haproxy.request("GET", "/", headers={"X-Request-Timeout": "0.5"}) for _ in range(2)]
    assert {answer.status_code for answer in answers} == {200}
    assert instances[0].came
    assert time.monotonic() - began < 10


def test_a_read_that_kills_whoever_gets_it_is_sent_to_three(haproxy: HAProxy, instances: list[Instance]) -> None:
    for instance in instances:
        instance.closes = 9
    assert haproxy.request("GET", "/").status_code == 503
    assert sum(len(instance.came) for instance in instances) == 3


def test_an_instance_is_told_that_its_client_has_gone(haproxy: HAProxy, instances: list[Instance]) -> None:
    for instance in instances:
        instance.may_answer.clear()
    with haproxy.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: instances[0].came + instances[1].came)
    wait_until(lambda: haproxy.statistics()["kuaishang", "BACKEND"]["scur"] == "0")
    assert len(instances[0].came + instances[1].came) == 1  # nobody else is asked


def test_prometheus_is_told_of_each_instance_and_nobody_else(haproxy: HAProxy, instances: list[Instance]) -> None:
    instances[0].closes = 1
    assert [haproxy.request("GET", "/").status_code for _ in range(2)] == [200, 200]
    instances[0].closes = instances[1].closes = 1
    assert [haproxy.request("POST", "/").status_code for _ in range(2)] == [503, 503]
    scraped = requests.get(f"{haproxy.statistics_url}/metrics", timeout=WAIT_SECONDS).text
    assert 'haproxy_server_status{proxy="kuaishang",server="web-1",state="UP"} 1' in scraped
    assert 'haproxy_server_status{proxy="kuaishang",server="web-1",state="DOWN"} 0' in scraped
    assert 'haproxy_backend_active_servers{proxy="kuaishang"} 2' in scraped
    assert 'haproxy_backend_retry_warnings_total{proxy="kuaishang"} 1' in scraped
    assert 'haproxy_backend_redispatch_warnings_total{proxy="kuaishang"} 1' in scraped
    assert 'haproxy_frontend_http_responses_total{proxy="https",code="5xx"} 2' in scraped
    samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
    assert OF_HAPROXY.items() <= {sample.name: {*sample.labels} for sample in samples}.items()
    for readme in (FOLDER / "README.md", FOLDER / "README.zh-CN.md"):
        assert set(re.findall(r"`(haproxy_\w+)`", readme.read_text())) <= set(re.findall(r"(?m)^\w+", scraped))
    assert requests.get(f"{haproxy.statistics_url}/", timeout=WAIT_SECONDS).status_code == 404


def test_a_reload_and_a_request_that_is_under_way(haproxy: HAProxy, instances: list[Instance]) -> None:
    for instance in instances:
        instance.may_answer.clear()
    with ThreadPoolExecutor(1) as executor:
        slow = executor.submit(haproxy.request, "POST", "/slow")
        wait_until(lambda: instances[0].came + instances[1].came)
        haproxy.reload()
        for instance in instances:
            instance.may_answer.set()
        assert slow.result().status_code == 200


def test_a_client_that_was_idle_at_a_reload_is_answered(haproxy: HAProxy) -> None:
    def ask(client: socket.socket) -> tuple[int, str | None]:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        response, _ = haproxy.read(client)
        return response.status, response.getheader("Connection")

    with haproxy.connect() as client:
        assert ask(client) == (200, None)
        haproxy.reload()
        assert ask(client) == (200, "close")


class Drain:
    """deploy/haproxy/drain.py, and what it said."""

    def __init__(self, haproxy: HAProxy, *words: str | Path, seconds: float = WAIT_SECONDS) -> None:
        command = [sys.executable, FOLDER / "drain.py", "--socket", haproxy.socket]
        command += ["--state", haproxy.state, "--seconds", str(seconds), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, output, errors


def test_an_instance_is_drained_patched_and_put_back(
    haproxy: HAProxy, instances: list[Instance], tmp_path: Path
) -> None:
    drained, other = instances
    for instance in instances:
        instance.may_answer.clear()
    mark = tmp_path / "patched"
    with ThreadPoolExecutor(2) as executor:
        slow = [executor.submit(haproxy.request, "POST", f"/slow-{number}") for number in range(2)]
        wait_until(lambda: drained.came and other.came)
        drain = Drain(haproxy, "web-1", "--", "touch", mark)
        wait_until(lambda: haproxy.status("web-1") == "DRAIN")
        other.may_answer.set()
        assert {haproxy.request("POST", "/").status_code for _ in range(4)} == {200}
        assert len(drained.came) == 1
        assert not mark.exists()
        drained.is_ready = False  # as after a restart that takes a while
        drained.may_answer.set()
        assert {answer.result().status_code for answer in slow} == {200}
        wait_until(mark.exists)
        assert not haproxy.is_up("web-1")
        assert haproxy.request("POST", "/").status_code == 200
        drained.is_ready = True
    assert drain.result() == (0, "web-1: drain\nweb-1: maint\nweb-1: ready\n", "")
    assert haproxy.is_up("web-1")
    assert int(haproxy.statistics()["kuaishang", "web-1"]["weight"]) < 100
    wait_until(lambda: haproxy.request("GET", "/") and len(drained.came) > 1)


def test_an_instance_that_is_out_stays_so_over_a_reload_until_it_is_put_back(haproxy: HAProxy) -> None:
    assert Drain(haproxy, "web-1").result()[0] == 0
    haproxy.reload()
    assert [haproxy.status("web-1", backend) for backend in ("kuaishang", "unready")] == ["DRAIN", "DRAIN"]
    assert Drain(haproxy, "--ready", "web-1").result()[0] == 0
    haproxy.reload()
    assert haproxy.is_up("web-1")


def test_after_a_drain_an_instance_is_where_the_configuration_says(haproxy: HAProxy, instances: list[Instance]) -> None:
    elsewhere = "127.0.0.1:9"
    assert Drain(haproxy, "web-1").result()[0] == 0
    haproxy.move("web-2", elsewhere)
    haproxy.reload()
    assert haproxy.status("web-1") == "DRAIN"
    assert haproxy.statistics()["kuaishang", "web-2"]["addr"] == elsewhere
    assert Drain(haproxy, "--ready", "web-1").result()[0] == 0
    haproxy.move("web-1", instances[1].address)
    haproxy.reload()
    for backend in ("kuaishang", "unready"):
        assert haproxy.statistics()[backend, "web-1"]["addr"] == instances[1].address
    assert haproxy.statistics()["kuaishang", "web-1"]["weight"] == "100"  # not slowly, as it is warm


def test_an_instance_that_is_out_gets_nothing_also_if_no_other_is_ready(
    haproxy: HAProxy, instances: list[Instance]
) -> None:
    out, other = instances
    assert Drain(haproxy, "web-1").result()[0] == 0
    other.is_ready = False
    wait_until(lambda: not haproxy.is_up("web-2"))
    assert {haproxy.request("POST", "/").status_code for _ in range(4)} == {200}
    assert (out.came, len(other.came)) == ([], 4)


def test_what_an_instance_got_when_none_was_ready_is_waited_for(haproxy: HAProxy, instances: list[Instance]) -> None:
    for instance in instances:
        instance.is_ready = False
        instance.may_answer.clear()
    wait_until(lambda: not haproxy.is_up("web-1") and not haproxy.is_up("web-2"))
    with ThreadPoolExecutor(2) as executor:
        slow = [executor.submit(haproxy.request, "POST", "/slow")]
        wait_until(lambda: instances[0].came or instances[1].came)
        slow.append(executor.submit(haproxy.request, "POST", "/slow"))
        wait_until(lambda: instances[0].came and instances[1].came)
        instances[1].is_ready = True
        wait_until(lambda: haproxy.is_up("web-2"))
        code, _, errors = Drain(haproxy, "web-1", seconds=0.3).result()
        assert (code, errors) == (1, "web-1: it still has requests after 0.3 s\n")
        for instance in instances:
            instance.may_answer.set()
        assert {answer.result().status_code for answer in slow} == {200}


def test_an_instance_is_taken_out_of_two_haproxies_and_put_back(
    haproxy: HAProxy, instances: list[Instance], tmp_path: Path
) -> None:
    both = [haproxy, HAProxy(tmp_path / "other", {"web-1": instances[0].address, "web-2": instances[1].address})]
    try:
        assert Drain(haproxy, "--socket", both[1].socket, "web-1").result()[0] == 0
        assert [one.status("web-1") for one in both] == ["DRAIN", "DRAIN"]
        assert Drain(haproxy, "--socket", both[1].socket, "--ready", "web-1").result()[0] == 0
        assert [one.is_up("web-1") for one in both] == [True, True]
    finally:
        both[1].discard()


FAILURES = {
    "a command that fails": (["web-1", "--", "false"], "DRAIN", "web-1: false ended with status 1\n"),
    "no such instance": (["web-3"], "UP", "there is no such server in kuaishang\n"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_done_is_said(haproxy: HAProxy, name: str) -> None:
    words, status, said = FAILURES[name]
    code, _, errors = Drain(haproxy, *words).result()
    assert (code, haproxy.status("web-1")) == (1, status)
    assert errors.endswith(said)


def test_an_instance_that_does_not_become_ready_stays_out(haproxy: HAProxy, instances: list[Instance]) -> None:
    instances[0].is_ready = False
    code, _, errors = Drain(haproxy, "web-1", "--", "true", seconds=0.3).result()
    assert (code, haproxy.is_up("web-1")) == (1, False)
    assert errors == "web-1: its /readyz does not answer 200 after 0.3 s\n"


def test_the_last_instance_is_not_taken_out(haproxy: HAProxy, instances: list[Instance]) -> None:
    instances[1].is_ready = False
    wait_until(lambda: not haproxy.is_up("web-2"))
    code, _, errors = Drain(haproxy, "web-1").result()
    assert (code, haproxy.status("web-1")) == (1, "UP")
    assert errors == f"web-1: {haproxy.socket}: no other instance is up\n"
