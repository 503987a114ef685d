"""What serves the documents, and what protects the page; tests/dev/test_docs_page.py opens that in a browser."""

import re
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

from tests.harness import ROOT

CHINESE, ENGLISH = (ROOT / name for name in ("openapi.json", "openapi.en.json"))
FILES = ("/docs", "/docs/docs.js", "/docs/docs.css", "/docs/assets/swagger-ui-bundle.js")


@pytest.mark.parametrize(
    ("query", "accepted", "file"),
    [
        ("", "", CHINESE),
        ("", "en-US,en;q=0.9", ENGLISH),
        ("", "fr", CHINESE),
        ("?lang=en", "zh", ENGLISH),
        ("?lang=zh", "en", CHINESE),
        ("?lang=fr", "en", ENGLISH),
    ],
)
def test_the_document_is_the_file_in_the_language_that_is_asked_for(
    client: FlaskClient, query: str, accepted: str, file: object
) -> None:
    answer = client.get(f"/openapi.json{query}", headers={"Accept-Language": accepted})
    assert answer.data == file.read_bytes()  # type: ignore[attr-defined]
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    assert "Accept-Language" in answer.vary
    assert answer.cache_control.no_cache
    assert "X-Trace-Id" in answer.headers


def test_a_document_that_is_known_is_not_sent_again(client: FlaskClient) -> None:
    tags = [client.get(f"/openapi.json?lang={language}").headers["ETag"] for language in ("zh", "en")]
    known = client.get("/openapi.json?lang=en", headers={"If-None-Match": tags[1]})
    assert (known.status_code, known.data) == (304, b"")
    assert "Accept-Language" in known.vary
    assert client.get("/openapi.json?lang=en", headers={"If-None-Match": tags[0]}).status_code == 200


def test_by_default_there_is_no_page(make_app: Callable[..., Flask]) -> None:
    client = make_app(DOCS="").test_client()
    for path in FILES:
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.get_json()["code"] == 404
    assert client.get("/openapi.json").status_code == 200


def test_the_page_loads_nothing_from_elsewhere(client: FlaskClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 5
    for url in loaded:
        assert url.startswith("/docs/"), url
        with client.get(url) as asset:
            assert asset.status_code == 200, url


def test_the_page_has_no_button_and_no_inline_script(client: FlaskClient) -> None:
    page = client.get("/docs").text
    assert re.findall(r"<script[^>]*>([^<]+)", page) == []
    assert "docs_login" not in page
    for method, path in (("GET", "/docs/docs_login.js"), ("POST", "/docs/code")):
        assert client.open(path, method=method).status_code == 404


@pytest.mark.parametrize("path", FILES)
def test_a_strict_policy_protects_the_page(client: FlaskClient, path: str) -> None:
    with client.get(path) as answer:
        policy = dict(part.split(maxsplit=1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
        "img-src": "'self' data:",
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
    }
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/docs/assets/../../settings.py", "/docs/assets/%2e%2e/flask_swagger_ui.py"])
def test_asset_paths_lead_to_no_other_file(client: FlaskClient, path: str) -> None:
    assert client.get(path).status_code == 404
