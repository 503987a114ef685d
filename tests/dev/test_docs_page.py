"""The page /docs in Chromium, under `make run` and in production."""

import json
import re
from collections.abc import Iterator

import pytest

from errors import Code
from tests.dev.launched import Launched
from tests.harness import ROOT, WAIT_SECONDS, Service, Simulator

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make browser`")

from playwright.sync_api import Browser, BrowserContext, Page

from dev.screenshots import CHROMIUM, ME, ORDER, ORDERS, chromium, log_in, open_docs, try_out

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")

DOCUMENTS = {
    name: json.loads((ROOT / file).read_text()) for name, file in (("zh", "openapi.json"), ("en", "openapi.en.json"))
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("run")
    launched = Launched(folder / "var", folder / "output")
    try:
        yield launched.ready()
    finally:
        launched.stop()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that is new here, of somebody in China; it reports no error, and talks to no other host than ours."""
    with browser.new_context(locale="zh-CN") as context:
        context.set_default_timeout(WAIT_SECONDS * 1000)
        reports: list[str] = []
        urls: list[str] = []
        # Chromium reports each response of 4xx, which may be what a call is for.
        context.on("console", lambda report: reports.append(f"{report.type} {report.text} {report.location['url']}"))
        context.on("weberror", lambda error: reports.append(str(error.error)))
        context.on("request", lambda request: urls.append(request.url))
        yield context
        called = re.compile(r"error Failed to load resource: the server responded with a status of 4\d\d .*/api/v1/.*")
        assert [report for report in reports if not called.fullmatch(report)] == []
        assert [url for url in urls if not re.match(r"http://127\.0\.0\.1:\d+/", url)] == []
        assert urls


@pytest.fixture
def page(context: BrowserContext, running: Launched) -> Page:
    page = context.new_page()
    open_docs(page, running.url)
    return page


def test_one_click_logs_in_and_calls_show_their_envelopes(page: Page) -> None:
    response, shown = try_out(page, "get", ME, user_id="me")
    assert (response.status, shown["code"]) == (401, 401)
    log_in(page)
    response, shown = try_out(page, "get", ME, user_id="me")
    assert (response.status, shown["code"], shown["message"]) == (200, 200, Code.SUCCESS.message.chinese)
    assert shown["data"]["role"] == "user"

    created, order = try_out(page, "post", ORDERS)
    again, other = try_out(page, "post", ORDERS)
    assert (created.status, again.status) == (201, 201)
    assert order["data"]["id"] != other["data"]["id"]
    assert order.keys() == {"code", "message", "data"}

    changed = [
        try_out(page, "put", ORDER, order_id=str(order["data"]["id"])) for _ in range(2)
    ]  # from the same version
    assert [response.status for response, _ in changed] == [200, 412]
    assert changed[0][1]["data"]["version"] == order["data"]["version"] + 1
    assert changed[1][1] == {"code": 412, "message": Code.PRECONDITION_FAILED.message.chinese, "data": None}


def test_the_authorization_is_kept_over_a_reload(page: Page) -> None:
    log_in(page)
    before = try_out(page, "get", ME, user_id="me")[1]
    page.reload()
    assert try_out(page, "get", ME, user_id="me")[1] == before
    assert before["code"] == 200
    assert page.context.cookies() == []


def test_a_click_changes_the_language_and_that_is_kept(page: Page) -> None:
    assert_language(page, "zh")
    for language in ("en", "zh"):
        page.click("#language")
        page.wait_for_selector(f"html[lang={language}] .opblock")
        assert_language(page, language)
        page.reload()
        assert_language(page, language)


def assert_language(page: Page, language: str) -> None:
    """Of the page's own words, of the document, and of the messages of the responses."""
    page.wait_for_selector(f"html[lang={language}] .opblock")
    assert page.locator("#language").inner_text() == {"zh": "English", "en": "中文"}[language]
    document = DOCUMENTS[language]
    summary = document["paths"][ME]["get"]["summary"]
    operation = page.locator(f'.opblock-get:has([data-path="{ME}"])')
    assert operation.locator(".opblock-summary-description").inner_text() == summary
    operation.locator(".opblock-summary-control").click()
    message = Code.UNAUTHORIZED.message
    assert try_out(page, "get", ME, user_id="me")[1]["message"] == (
        message.chinese if language == "zh" else message.english
    )


def test_somebody_elsewhere_begins_with_english(browser: Browser, running: Launched) -> None:
    for locale, language in (("en-GB", "en"), ("fr", "zh")):
        with browser.new_context(locale=locale) as context:
            page = context.new_page()
            open_docs(page, running.url)
            assert page.locator(f"html[lang={language}]").count() == 1


def test_the_groups_are_in_the_order_of_the_document(page: Page) -> None:
    shown = [group.get_attribute("data-tag") for group in page.locator(".opblock-tag").all()]
    assert shown == [tag["name"] for tag in DOCUMENTS["zh"]["tags"]]
    for earlier, later in (("login", "users"), ("users", "orders"), ("orders", "messages"), ("messages", "health")):
        assert shown.index(earlier) < shown.index(later)
    assert shown[-2:] == ["health", "metrics"]


def test_the_code_table_is_folded(page: Page) -> None:
    table = page.locator(".info table")
    assert not table.is_visible()
    page.click(".info summary")
    assert table.is_visible()
    assert [row.split()[0] for row in table.locator("tbody tr").all_inner_texts()] == [
        str(code.number) for code in Code
    ]


def test_the_policy_stops_scripts_and_connections_that_are_not_ours(browser: Browser, running: Launched) -> None:
    """What somebody might get into the page, such as by a text of the document."""
    with browser.new_context() as context:
        page = context.new_page()
        open_docs(page, running.url)
        page.evaluate("window.stopped = []")
        page.evaluate("addEventListener('securitypolicyviolation', (stop) => stopped.push(stop.effectiveDirective))")
        page.evaluate("""() => {
            const script = document.createElement('script');
            script.textContent = 'window.ran = true';
            document.body.append(script);
            document.body.insertAdjacentHTML('beforeend', '<img src="data:," onerror="window.ran = true">');
            fetch('http://127.0.0.2/').catch(() => {});
        }""")
        page.wait_for_function("stopped.length === 3")
        assert set(page.evaluate("stopped")) == {"script-src-elem", "script-src-attr", "connect-src"}
        assert page.evaluate("window.ran") is None


def test_in_production_the_page_has_no_button(
    context: BrowserContext, services: tuple[Service, Service], simulator: Simulator
) -> None:
    service = services[0]
    page = context.new_page()
    open_docs(page, service.url)
    assert page.locator("header button").count() == 1  # the language
    page.click(".authorize")
    bearer = page.locator('.auth-container form:has(code:text-is("bearer"))')
    bearer.locator("input").fill(service.log_in(simulator))
    bearer.locator("button[type=submit]").click()
    page.keyboard.press("Escape")
    response, shown = try_out(page, "get", ME, user_id="me")
    assert (response.status, shown["code"]) == (200, 200)
