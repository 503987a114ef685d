"""Who gets the button on /docs; test_docs_page.py clicks it."""

import requests

from tests.dev.launched import Launch
from tests.harness import WAIT_SECONDS


def button_and_code(url: str, **headers: str) -> tuple[bool, int]:
    """Whether the page has a button, and the status of what it asks for."""
    page = requests.get(f"{url}/docs", headers=headers, timeout=WAIT_SECONDS)
    assert page.status_code == 200
    code = requests.post(f"{url}/docs/code", headers=headers, timeout=WAIT_SECONDS)
    return "docs_login.js" in page.text, code.status_code


def test_the_button_is_for_this_machine_alone(launch: Launch) -> None:
    launched = launch(HOST="::", TRUSTED_PROXIES="127.0.0.1").ready()
    assert button_and_code(launched.url) == (True, 200)
    assert button_and_code(launched.url, **{"X-Forwarded-For": "192.0.2.1"}) == (False, 404)


def test_with_a_real_account_there_is_no_button(launch: Launch, environ: dict[str, str]) -> None:
    assert button_and_code(launch(**environ).ready().url) == (False, 404)
