"""JSON read without the leniencies of `json.loads`."""

import json
from typing import Any

MAXIMUM_DEPTH = 32
"""Objects and arrays inside one another; WeChat sends about five."""


def loads(text: str) -> Any:
    """Read a JSON text (RFC 8259) whose values any other program would read alike and can be written again.

    :raises ValueError: for all else, and for duplicate keys, NaN and infinity, also as 1e999, halves of surrogate
        pairs, and more than MAXIMUM_DEPTH levels.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("Nested too deeply.") from None
    if _is_deeper(document, MAXIMUM_DEPTH):
        raise ValueError("Nested too deeply.")
    json.dumps(document, ensure_ascii=False, allow_nan=False).encode()  # fails for NaN and halves of surrogate pairs
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
