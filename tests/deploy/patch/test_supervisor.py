"""The supervisor, given releases that no check has looked at: whatever is in them, no request fails."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from deploy.patch.supervisor import Figures, read_env
from tests.deploy.patch.broken import BROKEN, CREATED, EACH_REQUEST, Change, add
from tests.deploy.patch.server import NEXT_METRICS_TOKEN, Patched, Server, replace_workers
from tests.faults.load import codes, is_right, load
from tests.harness import METRICS_TOKEN, ROOT, WAIT_SECONDS, bearer, wait_until


@pytest.mark.parametrize(("change", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_release_is_refused_and_no_request_fails(
    stage: Patched, server: Server, change: Change, reason: str
) -> None:
    before, state = server.serves(), json.loads(server.state.read_text())
    broken = server.release(change)

    with load(stage) as running:
        ended = server.patch(broken)
        time.sleep(0.2)

    assert (ended["end"], ended["serves"]) == ("refused", before)
    assert reason in ended["why"]
    assert json.loads(server.state.read_text()) == state
    assert server.serves() == before
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    assert running.count_orders() == (0, 0)
    assert running.missing_sessions == 0


def test_a_good_release_takes_over_and_no_request_fails(stage: Patched, server: Server) -> None:
    release, pid = server.release(), server.process.popen.pid

    with load(stage) as running:
        ended = server.patch(release, watch=1)
        if "a request takes" in ended.get("why", ""):  # from new workers on a busy machine
            ended = server.patch(release, watch=1)
        assert server.serves() == server.current() == release
        time.sleep(0.2)

    assert (ended["end"], ended["serves"]) == ("done", release)
    [said] = [line for line in server.lines() if line.get("release") == release and line["message"] == "patch: done"]
    assert said["version"] == f"0.1.0+{release}"
    assert said["instance"].endswith(f":{server.port}")
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    assert running.count_orders() == (0, 0)
    assert server.process.popen.pid == pid
    assert server.process.popen.poll() is None


def test_a_worker_that_dies_after_a_patch_or_a_rollback_is_replaced_by_one_of_the_same_release(server: Server) -> None:
    before, release = server.serves(), server.release()
    server.patch(release)
    replace_workers(server)
    assert server.serves() == release

    assert server.ask("rollback")["serves"] == before
    replace_workers(server)
    assert server.serves() == before


def test_what_fails_too_often_after_the_takeover_is_taken_back(stage: Patched, server: Server) -> None:
    before = server.serves()
    bad = server.release(add("blueprints/orders.py", "    1 / 0", "    order = Order("))

    with load(stage) as running:
        ended = server.patch(bad, watch=WAIT_SECONDS)
        time.sleep(3)  # what the retired workers still serve
        back = time.monotonic()
        time.sleep(1)

    assert (ended["end"], ended["serves"]) == ("went back", before)
    assert "5xx" in ended["why"]
    assert server.serves() == before
    assert [outcome for outcome in running.since(back) if not is_right(outcome)] == []
    assert running.count_orders() == (0, 0)


def test_a_worker_that_dies_while_it_is_watched_takes_the_release_back(server: Server) -> None:
    before = server.serves()
    bad = server.release(add("blueprints/health.py", "    os._exit(1)", '    return current_app.config["RELEASE"]'))
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.patch, bad, WAIT_SECONDS)
        wait_until(lambda: json.loads(server.state.read_text())["provisional"] == bad)
        while not asked.done():
            try:
                requests.get(f"{server.url}/version", timeout=2)
            except requests.RequestException:
                time.sleep(0.05)
    assert asked.result()["end"] == "went back"
    assert server.serves() == before


def test_a_rollback_during_the_watch_ends_the_patch(server: Server) -> None:
    before, release = server.serves(), server.release()
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.patch, release, WAIT_SECONDS)
        wait_until(lambda: server.serves() == release)
        assert server.ask("rollback")["end"] == "done"
    assert asked.result()["end"] == "went back"
    assert server.serves() == before


def test_a_second_patch_is_refused_while_one_is_going_on(server: Server) -> None:
    one, other = server.release(), server.release()
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.patch, one, 3)
        wait_until(lambda: json.loads(server.state.read_text())["provisional"] == one)
        refused = server.patch(other)
    assert refused["end"] == "busy"
    assert "one at a time" in refused["why"]
    assert asked.result()["serves"] == one


def test_a_reload_during_a_patch_comes_after_it(server: Server) -> None:
    release = server.release()
    reloads = server.said("reloaded")
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.patch, release, 2)
        wait_until(lambda: json.loads(server.state.read_text())["provisional"] == release)
        server.process.popen.send_signal(signal.SIGHUP)
        assert asked.result()["end"] == "done"
    wait_until(lambda: server.said("reloaded") == reloads + 1)
    assert server.serves() == release


def test_what_is_not_understood_changes_nothing(server: Server) -> None:
    before, state = server.serves(), server.state.read_text()
    for what, words in (("promote", {}), ("patch", {}), ("patch", {"release": ["?"], "watch": 0})):
        assert server.ask(what, **words)["end"] == "refused"
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(str(server.home / "control.sock"))
        control.sendall(b"rubbish\n")
        assert json.loads(control.makefile().readline())["end"] == "refused"
    assert server.ask("status")["busy"] == ""
    assert (server.serves(), server.state.read_text()) == (before, state)


def test_a_rollback_before_the_takeover_ends_a_patch_that_is_not_watched(server: Server) -> None:
    before, release = server.serves(), server.release(add("wsgi.py", "import time; time.sleep(2)"))
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.patch, release)
        wait_until(lambda: json.loads(server.state.read_text())["provisional"] == release)
        assert server.ask("rollback")["end"] == "done"
    assert asked.result()["end"] == "went back"
    assert server.serves() == before


def test_a_patch_whose_state_cannot_be_written_is_refused(server: Server) -> None:
    before, release = server.serves(), server.release()
    draft = server.home / "state.draft"
    draft.mkdir()
    refused = server.patch(release)
    draft.rmdir()
    assert (refused["end"], refused["serves"]) == ("refused", before)
    assert server.serves() == before
    server.patch(release)
    assert server.ask("rollback")["serves"] == server.serves() == before


@pytest.mark.parametrize("cure", ["patch", "rollback"])
def test_when_nothing_serves_a_patch_and_a_rollback_help(
    stage: Patched, tmp_path: Path, request: pytest.FixtureRequest, cure: str
) -> None:
    # Nobody waits until the bad one has had its time.
    server = Server(tmp_path / "home", stage.server.environ | {"START_SECONDS": "600", "PORT": ""}, **stage.secrets)
    request.addfinalizer(server.discard)
    good, bad, better = server.serves(), server.release(), server.release()
    server.patch(bad)
    add("wsgi.py", "import time; time.sleep(600)")(server.home / "releases" / bad)
    for master in server.masters():
        master.kill()
    wait_until(lambda: server.said("the release that served has died"))
    done = server.patch(better) if cure == "patch" else server.ask("rollback")
    assert done["end"] == "done", done["why"]
    assert server.serves() == (better if cure == "patch" else good)


def test_a_master_that_hangs_is_replaced_by_a_patch(server: Server) -> None:
    release = server.release()
    master = next(master for master in server.masters() if master.children())
    master.suspend()
    assert server.patch(release)["end"] == "done"
    assert server.serves() == release
    assert not master.is_running()


def test_what_gets_slow_or_not_ready_after_the_takeover_is_taken_back(stage: Patched, server: Server) -> None:
    before = server.serves()
    worse = {
        "a request takes": add("wsgi.py", EACH_REQUEST.format("import time; time.sleep(1.5)"), CREATED),
        "/readyz answers 503": add(
            "blueprints/health.py",
            "    calls = current_app.extensions.setdefault('calls', [])\n    calls.append(1)\n"
            "    if len(calls) > 3:\n        raise ApiError(Code.UNAVAILABLE)",
            "    is_stopping",
        ),
    }
    with load(stage):
        for reason, change in worse.items():
            ended = server.patch(server.release(change), watch=WAIT_SECONDS)
            assert (ended["end"], ended["serves"]) == ("went back", before)
            assert reason in ended["why"]
    assert server.serves() == before


def test_what_hangs_at_the_end_of_the_watch_is_taken_back(server: Server) -> None:
    before = server.serves()
    hang = "app.calls = []\n" + EACH_REQUEST.format("app.calls.append(1); len(app.calls) > 4 and time.sleep(600)")
    ended = server.patch(server.release(add("wsgi.py", f"import time\n{hang}", CREATED)), watch=3)
    assert (ended["end"], ended["serves"]) == ("went back", before)
    assert server.serves() == before


def test_what_an_operator_has_switched_off_takes_no_release_back(stage: Patched, server: Server) -> None:
    url, release = f"{server.url}/api/v1/users/me", server.release()
    with stage.redis_client() as redis, ThreadPoolExecutor(1) as executor:
        off = {"event": "route off", "since": "2026-01-01T00:00:00Z", "by": "the test", "reason": ""}
        redis.hset("switches", "GET /api/v1/users/{user_id}", json.dumps(off))
        try:
            wait_until(lambda: requests.get(url, timeout=WAIT_SECONDS).status_code == 503)
            asked = executor.submit(server.patch, release, 3)
            while not asked.done():
                requests.get(url, timeout=WAIT_SECONDS)
            assert asked.result()["end"] == "done", asked.result()["why"]
            assert server.counted().requests < 5
        finally:
            redis.delete("switches")
    wait_until(lambda: requests.get(url, timeout=WAIT_SECONDS).status_code == 401)


@pytest.mark.parametrize(
    ("errors", "requests", "worse"), [(1, 1, False), (2, 2, True), (4, 10, False), (5, 100, True), (5, 10000, False)]
)
def test_of_few_requests_most_must_fail(errors: int, requests: int, worse: bool) -> None:
    assert bool(Figures(requests, errors).worse_than(Figures(1000))) == worse


def test_no_rollback_to_what_is_not_ready_any_more(server: Server, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    lines = f"    if os.path.exists({str(flag)!r}):\n        raise ApiError(Code.UNAVAILABLE)"  # as without a column
    before, release = server.release(add("blueprints/health.py", lines, "    is_stopping")), server.release()
    server.patch(before)
    server.patch(release)
    flag.touch()
    refused = server.ask("rollback")
    assert (refused["end"], refused["why"]) == ("refused", "its /readyz answers 503")
    assert server.serves() == server.current() == release
    flag.unlink()
    assert server.ask("rollback")["serves"] == server.serves() == before


def test_a_rollback_passes_by_a_release_that_is_gone(server: Server) -> None:
    before, lost, release = server.serves(), server.release(), server.release()
    server.patch(lost)
    server.patch(release)
    shutil.rmtree(server.home / "releases" / lost)
    assert server.ask("rollback")["serves"] == server.serves() == before


def test_a_rollback_has_the_settings_of_the_last_reload(server: Server) -> None:
    before, given = server.serves(), read_env(server.home / ".env")
    server.patch(server.release())
    server.write_settings(**given | {"METRICS_TOKEN": "after-the-rotation"})
    reloads = server.said("reloaded")
    server.process.popen.send_signal(signal.SIGHUP)
    wait_until(lambda: server.said("reloaded") == reloads + 1)
    assert server.ask("rollback")["end"] == "done"
    assert server.serves() == before
    answer = requests.get(f"{server.url}/metrics", headers=bearer("after-the-rotation"), timeout=WAIT_SECONDS)
    assert answer.status_code == 200
    server.write_settings(**given)
    server.process.popen.send_signal(signal.SIGHUP)
    wait_until(lambda: server.said("reloaded") == reloads + 2)


def test_a_rollback_does_not_bring_back_what_was_counted_before(server: Server) -> None:
    for _ in range(100):
        requests.get(f"{server.url}/nowhere", timeout=WAIT_SECONDS)
    assert server.counted().requests >= 100
    server.patch(server.release())
    server.ask("rollback")
    server.serves()
    assert server.counted().requests < 100


def test_rollbacks_lead_to_the_release_before_and_the_one_before_that(server: Server) -> None:
    first, *others = (server.serves(), server.release(), server.release())
    for release in others:
        server.patch(release)
    assert [server.ask("rollback")["serves"] for _ in range(2)] == [others[0], first]
    assert server.serves() == server.current() == first
    if json.loads(server.state.read_text())["previous"]:
        wait_until(lambda: len(server.masters()) == 2)  # the one before waits for the next rollback


@pytest.mark.parametrize("when", ["starting", "watched"])
def test_a_crash_before_a_release_has_proved_itself_brings_back_the_one_before(server: Server, when: str) -> None:
    before = server.serves()
    new = server.release(add("wsgi.py", "import time; time.sleep(2)") if when == "starting" else lambda tree: None)
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.patch, new, WAIT_SECONDS)
        wait_until(lambda: json.loads(server.state.read_text())["provisional"] == new)
        if when == "watched":
            wait_until(lambda: server.serves() == new)
        server.process.kill()
    assert "end" not in asked.result(), asked.result().get("why")
    server.start()
    assert server.serves() == before
    assert json.loads(server.state.read_text())["provisional"] == ""


def test_what_starts_in_the_moment_of_a_crash_ends_too() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    starts = "import sys; from deploy.patch.supervisor import limit_child; limit_child(int(sys.argv[1]))"
    for supervisor, status in ((os.getpid(), 0), (gone.pid, 1)):
        child = [sys.executable, "-c", starts, str(supervisor)]
        assert subprocess.run(child, cwd=ROOT, timeout=WAIT_SECONDS).returncode == status


def test_a_release_that_has_proved_itself_serves_after_a_crash(server: Server) -> None:
    release = server.release()
    server.patch(release)
    server.process.kill()
    server.start()
    assert server.serves() == release


def test_a_full_disk_keeps_nothing_from_starting(server: Server) -> None:
    before, draft = server.serves(), server.home / "state.draft"
    server.process.kill()
    draft.mkdir()  # as little can be written there as on a full disk
    server.start()
    draft.rmdir()
    assert server.serves() == before


def test_a_rollback_ends_no_patch_where_nothing_serves(
    stage: Patched, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = Server(tmp_path / "home", stage.server.environ | {"START_SECONDS": "600", "PORT": ""}, **stage.secrets)
    request.addfinalizer(server.discard)
    slow = server.release(add("wsgi.py", "import time; time.sleep(3)"))
    add("wsgi.py", "raise SystemExit")(server.home / "releases" / server.serves())
    for master in server.masters():
        master.kill()
    wait_until(lambda: server.said("the current release does not start"))
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(server.patch, slow)
        wait_until(lambda: json.loads(server.state.read_text())["provisional"] == slow)
        assert server.ask("rollback")["end"] == "busy"
    assert asked.result()["end"] == "done", asked.result()["why"]
    assert server.serves() == slow


def test_a_master_that_dies_is_replaced(server: Server) -> None:
    release = server.serves()
    [master] = [master for master in server.masters() if master.children()]
    master.kill()
    wait_until(lambda: not master.is_running() and len(server.workers()) >= 2)
    wait_until(lambda: requests.get(f"{server.url}/readyz", timeout=WAIT_SECONDS).ok)
    assert server.serves() == release


def test_each_metrics_token_of_the_settings_is_accepted(server: Server) -> None:
    for token, status in ((METRICS_TOKEN, 200), (NEXT_METRICS_TOKEN, 200), ("another-metrics-token", 401)):
        answer = requests.get(f"{server.url}/metrics", headers=bearer(token), timeout=WAIT_SECONDS)
        assert answer.status_code == status


def test_a_reload_reads_the_settings_again_and_no_request_fails(stage: Patched, server: Server) -> None:
    given = read_env(server.home / ".env")
    with load(stage) as running:
        server.write_settings(**given, WEB_CONCURRENCY="3")
        server.process.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: any(line["message"] == "reloaded" for line in server.lines()))
        time.sleep(0.2)
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    wait_until(lambda: len(server.workers()) == 3)
    server.write_settings(**given)
    server.process.popen.send_signal(signal.SIGHUP)
    wait_until(lambda: len(server.workers()) == 2)


def test_a_reload_of_what_cannot_serve_is_one_line_and_a_metric(stage: Patched, server: Server) -> None:
    given = read_env(server.home / ".env")
    with load(stage) as running:
        server.write_settings(**given | {"SECRET_KEY": "short"})
        master = next(master for master in server.masters() if master.children())
        master.send_signal(signal.SIGHUP)  # by hand, and to the wrong process
        refused = wait_until(lambda: [line for line in server.lines() if "reload refused" in line["message"]])
        wait_until(lambda: "kuaishang_reload_refused 1.0" in server.metrics())
    assert [(line["level"], "SECRET_KEY" in line["reason"]) for line in refused] == [("ERROR", True)]
    assert [outcome for outcome in running.outcomes if not is_right(outcome)] == [], codes(running.outcomes)
    server.write_settings(**given)
    server.process.popen.send_signal(signal.SIGHUP)
    wait_until(lambda: "kuaishang_reload_refused 0.0" in server.metrics())


def test_a_stop_ends_all_processes_and_frees_the_port(server: Server) -> None:
    processes = [server.process.popen, *psutil.Process(server.process.popen.pid).children(recursive=True)]
    server.process.stop()
    _, alive = psutil.wait_procs(processes[1:], WAIT_SECONDS)
    assert alive == []
    assert server.process.popen.returncode == 0
    server.start()
