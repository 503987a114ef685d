"""Users who set their phone number: a write that takes WeChat's access token, and that nobody sends again."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import requests
import urllib3

from tests.harness import Simulator, bearer, wait_until
from tests.rehearsal.load import PATIENCE_SECONDS

PHONE_PATH = "/wxa/business/getuserphonenumber"
"""WeChat's, with the access token."""
USERS_OF_A_SITE, SLOW_SECONDS, PAUSE_SECONDS = 4, 2, 0.25
"""So that each of two instances has some requests all the time, if WeChat is slow."""

User = Callable[[], int]
"""Sets the phone number, and returns the status."""


def signed_in(simulator: Simulator, url: str) -> User:
    """Return a user who is signed in, and has set a phone number once.

    :param url: of an instance or of HAProxy, whose certificate may be for another name.
    """
    session, openid = requests.Session(), secrets.token_hex(8)
    session.headers["Connection"] = "close"  # another worker each time
    urllib3.disable_warnings()

    def send(method: str, path: str, code: str) -> requests.Response:
        return session.request(
            method, f"{url}/api/v1{path}", json={"code": code}, timeout=PATIENCE_SECONDS, verify=False
        )

    def log_in() -> bool:
        answer = send("POST", "/auth/wechat", simulator.code(openid=openid))
        if answer.ok:
            session.headers.update(bearer(answer.json()["data"]["token"]))
        return answer.ok

    def set_phone() -> int:
        return send("PUT", "/users/me/phone", simulator.phone_code(openid=openid)).status_code

    wait_until(log_in)
    wait_until(lambda: set_phone() == 200)
    return set_phone


@contextmanager
def all_the_time(users: Sequence[User]) -> Iterator[list[list[int]]]:
    """Let users set their phone numbers again and again until the end of the block.

    Yields the statuses that each gets, 0 for no response.
    """
    over, statuses = Event(), [list[int]() for _ in users]

    def go_on(user: User, seen: list[int]) -> None:
        while not over.wait(PAUSE_SECONDS):
            try:
                seen.append(user())
            except requests.RequestException:
                seen.append(0)

    with ThreadPoolExecutor(len(users)) as executor:
        running = [executor.submit(go_on, user, seen) for user, seen in zip(users, statuses, strict=True)]
        try:
            yield statuses
        finally:
            over.set()
    for one in running:
        one.result()
