"""What is expensive takes room by weight, and a read takes none."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from blueprints import personal_data
from blueprints.personal_data import EXPORT_WEIGHT
from concurrency import ROOM, room
from storage import ownership
from tests.blueprints.callers import Caller, code_of, data_of
from tests.blueprints.test_wechat_profile import encrypted_phone
from tests.harness import WAIT_SECONDS, Service, Simulator, wait_until
from tests.test_concurrency import is_free


def test_without_room_an_export_is_503_and_reads_are_served(alice: Caller) -> None:
    with room(ROOM):
        answer = alice.get("/users/me/export")
        assert code_of(answer) == (503, 503)
        assert int(answer.headers["Retry-After"]) > 0
        for path in ("/users/me", "/orders", "/orders?page=1000&page_size=100"):
            assert alice.get(path).status_code == 200
        assert alice.put("/users/me/phone", encrypted_phone(alice)).status_code == 200
    answer = alice.get("/users/me/export")
    assert answer.status_code == 200
    answer.close()
    assert is_free(ROOM)


def test_an_export_takes_as_much_as_it_weighs(alice: Caller) -> None:
    with room(ROOM - 4):
        answer = alice.get("/users/me/export")
        assert answer.status_code == 200
        answer.get_data()
    with room(ROOM - 3):
        assert code_of(alice.get("/users/me/export")) == (503, 503)


def test_an_export_takes_room_for_each_part_and_none_while_the_client_reads(
    alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "EXPORTED_AT_ONCE", 1)
    read_all, weighed = ownership.read_all, []

    def weigh(*args: Any) -> Iterator[Any]:
        for rows in read_all(*args):
            weighed.append([weight for weight in range(1, ROOM + 1) if not is_free(weight)])
            yield rows

    monkeypatch.setattr(personal_data.ownership, "read_all", weigh)
    for _ in range(3):
        alice.order()
    answer = alice.get("/users/me/export")
    for _ in answer.response:
        assert is_free(ROOM)
    answer.close()
    assert weighed == [[*range(ROOM - 3, ROOM + 1)]] * 4  # an identity and three orders


def test_an_export_may_take_longer_than_a_request(alice: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "EXPORTED_AT_ONCE", 1)
    placed = [alice.order() for _ in range(3)]
    answer = alice.get("/users/me/export", X_Request_Timeout="1")
    parts = iter(answer.response)
    read = [next(parts)]
    time.sleep(1.1)
    answer.response = [b"".join([*read, *parts])]
    assert data_of(answer)["orders"] == placed


def test_many_exports_of_one_user_keep_to_the_room_and_nobody_else_waiting(
    start_service: Callable[..., Service], simulator: Simulator
) -> None:
    service = start_service("tests.apps.slow_export", WEB_CONCURRENCY="1")
    one, another = service.log_in(simulator, openid="o-one"), service.log_in(simulator, openid="o-another")
    at_once = ROOM // EXPORT_WEIGHT
    parts = lambda: requests.get(f"{service.url}/parts", timeout=WAIT_SECONDS).json()  # noqa: E731
    export = lambda _: service.call("GET", "/users/me/export", one)  # noqa: E731
    with ThreadPoolExecutor(3 * at_once) as pool:
        # Each has one part, which takes 8 s. Whoever gets no room for its first part in 1 s is refused.
        answers = pool.map(export, range(3 * at_once))
        wait_until(lambda: parts()["now"] == at_once)
        for path in ("/users/me", "/orders"):
            assert service.call("GET", path, another).status_code == 200
        assert parts()["now"] == at_once  # while the exports went on
        exported, refused = [], []
        for answer in answers:
            (exported if answer.status_code == 200 else refused).append(answer)
    assert len(exported) >= at_once
    assert [len(answer.json()["data"]["identities"]) for answer in exported] == [1] * len(exported)
    assert refused
    for answer in refused:
        assert (answer.status_code, answer.json()["code"]) == (503, 503)
        assert int(answer.headers["Retry-After"]) > 0
    assert parts() == {"now": 0, "most": at_once}
