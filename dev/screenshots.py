"""`make screenshots`: the pictures of the READMEs, taken of a running `make run` by a headless Chromium.

Needs Debian's chromium and fonts-noto-cjk, and playwright, which `make screenshots` installs. The tests of the page use
the same steps.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Browser, Page, Response, sync_playwright

from dev.run import ROOT, listen

FOLDER = ROOT / "docs" / "screenshots"
CHROMIUM = shutil.which("chromium")
ME, ORDERS, ORDER = "/api/v1/users/{user_id}", "/api/v1/orders", "/api/v1/orders/{order_id}"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Chromium without its sandbox, which root and containers cannot have; it opens our own pages alone."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_docs(page: Page, url: str) -> None:
    """Open /docs of a service, and wait until the operations are there."""
    page.goto(f"{url}/docs")
    page.wait_for_selector(".opblock")


def log_in(page: Page) -> None:
    """Click the button of `make run`, and wait until the operations are unlocked."""
    page.click("#log-in")
    page.wait_for_selector(".authorization__btn.locked, .authorize.locked")


def try_out(page: Page, method: str, path: str, body: Any = None, **parameters: str) -> tuple[Response, Any]:
    """Call an operation on the page, as a person does.

    :param method: in small letters.
    :param body: to type as JSON; by default the example is sent.
    :param parameters: to type by their names, in which _ is also for -; the others are left as they are.
    :returns: the response, and the body that the page shows, which is JSON.
    """
    operation = page.locator(f'.opblock-{method}:has([data-path="{path}"])')
    if not operation.locator(".opblock-body").count():
        operation.locator(".opblock-summary-control").click()
    if not operation.locator(".execute").count():
        operation.locator(".try-out__btn").click()
    if body is not None:
        operation.locator("textarea.body-param__text").fill(json.dumps(body, ensure_ascii=False))
    for name, value in parameters.items():
        fields = [f'tr[data-param-name="{spelt}"] input' for spelt in (name, name.replace("_", "-"))]
        operation.locator(", ".join(fields)).fill(value)
    with page.expect_response(lambda response: "/api/" in response.url) as received:
        operation.locator(".execute").click()
    response = received.value
    shown = operation.locator(".live-responses-table", has_text=response.headers["x-trace-id"])
    return response, json.loads(shown.locator(".highlight-code pre").first.inner_text())


@contextmanager
def running() -> Iterator[str]:
    """Run `make run` with a folder of its own, and return its URL."""
    with listen("PORT", "0") as listener:
        port = str(listener.getsockname()[1])
    with TemporaryDirectory() as var:
        command = [sys.executable, "-m", "dev.run", "--var", var]
        env = os.environ | {"PORT": port}
        with subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as run:
            try:
                assert run.stderr
                next(line for line in run.stderr if "Ctrl-C stops everything" in line)
                yield f"http://127.0.0.1:{port}"
            finally:
                run.terminate()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with running() as url, chromium() as browser:
        page = browser.new_page(locale="zh-CN", viewport={"width": 1000, "height": 1780})
        open_docs(page, url)
        log_in(page)
        try_out(page, "get", ME)
        for group in page.locator(".opblock-tag:not([data-tag=users])").all():
            group.click()  # which folds it
        page.evaluate("scrollTo(0, 0)")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # the buttons fade
        page.screenshot(path=FOLDER / "docs.png")


if __name__ == "__main__":
    main()
