import json
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wechat.harness import JSON, PROPERTY
from wechat import lenient
from wechat.lenient import MAXIMUM_DEPTH


@PROPERTY
@given(JSON)
def test_json_is_read_back(document: object) -> None:
    for escaped in (True, False):
        assert lenient.read(json.dumps(document, ensure_ascii=escaped).encode(), "a test") == document


@pytest.mark.parametrize("text", ["", "{", "x{}", r'"\x"', r'"\ud80"', "9" * 5000, "[" * 100_000, '{"a":' * 100_000])
def test_invalid_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  json has many ways to say it
        lenient.read(text, None)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_the_depth_of_json_is_limited(opening: str, closing: str) -> None:
    lenient.read(opening * MAXIMUM_DEPTH + "1" + closing * MAXIMUM_DEPTH, None)
    with pytest.raises(ValueError, match="deep"):
        lenient.read(opening * (MAXIMUM_DEPTH + 1) + "1" + closing * (MAXIMUM_DEPTH + 1), None)


def test_equal_keys_and_what_follows_are_ignored() -> None:
    assert lenient.read('\ufeff [{"a": 1, "a": 2}] {}', None) == [{"a": 2}]
    assert lenient.read("[NaN, -Infinity]", None) == ["NaN", "-Infinity"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"list": ["a\x01"]}', "control character in a field"),
        (b'{"a": "\\u0001", "b": {"c": "\\ud83d"}}', "control character, half an emoji in a, c"),
        (b'{"o-secret": "\xff"}', "broken UTF-8 in a field"),  # not the name of a field
    ],
)
def test_the_log_names_kinds_and_fields_and_no_content(
    caplog: pytest.LogCaptureFixture, content: bytes, reason: str
) -> None:
    lenient.read(content, None)  # of a sender who is not verified
    assert caplog.records == []
    lenient.read(content, "/sns/userinfo")
    (line,) = caplog.records
    assert (vars(line)["interface"], vars(line)["reason"]) == ("/sns/userinfo", reason)


@PROPERTY
@given(st.text(st.sampled_from('{}[]":,\\ud8019eE.-+ tfn\x00')) | st.text(st.characters()) | st.binary())
def test_anything_is_read_or_raises_value_error(content: str | bytes) -> None:
    try:
        document = lenient.read(content, "a test")
    except ValueError:
        return
    assert not lenient.UNSTORABLE.search(json.dumps(document, ensure_ascii=False).replace("\\u", ""))


@pytest.mark.parametrize("piece", [b"<![CDATA[", b"&", b"&#", b"<a>", b'"a":"', b"\\", b"\\ud83d", b"<a>\xff", b'<"'])
def test_hostile_repetition_takes_linear_time(piece: bytes) -> None:
    def seconds(count: int) -> float:
        started = time.process_time()
        for form in ("xml", "json"):
            with suppress(ValueError):
                lenient.read(b"<xml>" + piece * count, "a test", form)  # type: ignore[arg-type]
        return time.process_time() - started

    seconds(100)
    assert seconds(16_000) < 100 * seconds(1000) + 0.05  # quadratic time would be 256 times as much
