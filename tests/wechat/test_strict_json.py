import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wechat.harness import JSON, PROPERTY
from wechat import strict_json
from wechat.strict_json import MAXIMUM_DEPTH


@PROPERTY
@given(JSON)
def test_json_is_read_back(document: object) -> None:
    assert strict_json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{} {}",
        "\ufeff{}",
        '{"a": 1, "a": 1}',
        '[{"a": {"b": 1, "b": 2}}]',
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e999",
        r'"\ud800"',
        r'{"\udc00": 1}',
        r'["\udc00\ud800"]',
        "9" * 5000,
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_ambiguous_or_invalid_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  json has many ways to say it
        strict_json.loads(text)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_the_depth_is_limited(opening: str, closing: str) -> None:
    strict_json.loads(opening * MAXIMUM_DEPTH + "1" + closing * MAXIMUM_DEPTH)
    with pytest.raises(ValueError, match="deep"):
        strict_json.loads(opening * (MAXIMUM_DEPTH + 1) + "1" + closing * (MAXIMUM_DEPTH + 1))


def test_a_surrogate_pair_is_a_character() -> None:
    assert strict_json.loads(r'"\ud83d\ude00"') == "😀"


@PROPERTY
@given(st.text(st.sampled_from('{}[]":,\\ud8019eE.-+ tfn\x00')) | st.text(st.characters()))
def test_any_text_is_read_or_raises_value_error(text: str) -> None:
    try:
        document = strict_json.loads(text)
    except ValueError:
        return
    json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
