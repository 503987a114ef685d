"""JSON read without the leniencies of `json.loads`."""

import json
from typing import Any

MAXIMUM_DEPTH = 32
"""The deepest nesting allowed; WeChat sends about five levels."""


def loads(text: str) -> Any:
    """Parse a JSON text (RFC 8259) whose meaning is the same for every parser, and which can be written again.

    :raises ValueError: for anything else: duplicate keys, NaN and infinity, also as 1e999, lone surrogates, and more
        than MAXIMUM_DEPTH levels.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("Nested too deeply.") from None
    if _is_deeper(document, MAXIMUM_DEPTH):
        raise ValueError("Nested too deeply.")
    json.dumps(document, ensure_ascii=False, allow_nan=False).encode()  # fails for NaN and lone surrogates
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("Duplicate key.")
    return document


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)
