import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wechat.harness import JSON_OBJECTS
from wechat import lenient
from wechat.lenient import MAXIMUM_DEPTH


@given(JSON_OBJECTS)
def test_json_is_read_back(document: object) -> None:
    for escaped in (True, False):
        assert lenient.read(json.dumps(document, ensure_ascii=escaped).encode(), "a test") == document


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", "x{}", r'"\x"', r'"\ud80"', "9" * 5000, "[" * 100_000, '{"a":' * 100_000]
)
def test_invalid_json_is_refused(text: str) -> None:
    assert lenient.read(text.encode(), None) is None


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_the_depth_of_json_is_limited(opening: str, closing: str) -> None:
    for levels, is_read in ((MAXIMUM_DEPTH - 1, True), (MAXIMUM_DEPTH, False)):
        text = f'{{"a":{opening * levels}1{closing * levels}}}'
        assert (lenient.read(text.encode(), None) is not None) == is_read


def test_equal_keys_and_what_follows_are_ignored() -> None:
    assert lenient.read('\ufeff {"a": 1, "a": [2]} {}'.encode(), None) == {"a": [2]}
    assert lenient.read(b'{"a": [NaN, -Infinity]}', None) == {"a": ["NaN", "-Infinity"]}


@pytest.mark.parametrize("content", [b'{"list": ["a\x01"]}', b'{"b": {"c": "\\ud83d"}}', b'{"o-secret": "\xff"}'])
def test_the_log_names_the_interface_and_no_content(caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    lenient.read(content, None)  # of a sender who is not verified
    lenient.read(b'{"a": ["b"]}', "/sns/userinfo")
    assert caplog.records == []
    lenient.read(content, "/sns/userinfo")
    (line,) = caplog.records
    assert (vars(line)["interface"], vars(line)["reason"]) == ("/sns/userinfo", "characters replaced")


@given(st.text(st.sampled_from('{}[]":,\\ud8019eE.-+ tfn\x00')) | st.text(st.characters()) | st.binary())
def test_anything_is_read_or_none(content: str | bytes) -> None:
    encoded = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    document = lenient.read(encoded, "a test")
    assert not lenient.UNSTORABLE.search(json.dumps(document, ensure_ascii=False).replace("\\u", ""))
