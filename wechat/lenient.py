"""Reads JSON and XML as WeChat sends them, at times with control characters, broken UTF-8 or half an emoji.

What is returned can be stored and written again: such characters have become U+FFFD. A signature is verified before, on
the text as it came. Our own callers' JSON is read strictly, in blueprints/parsing.py.
"""

import json
import logging
import re
from typing import Any, Literal
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree

logger = logging.getLogger(__name__)

Form = Literal["json", "xml"]
MAXIMUM_DEPTH = 32
"""The deepest nesting allowed; WeChat sends about five levels."""
UNSTORABLE = re.compile("[^\t\n\r\u0020-\u007e\u0080-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 forbids, and DEL."""


def read(content: bytes, source: str | None, form: Form = "json") -> dict[str, Any] | None:
    """Read a JSON object, or the children of an <xml> element: each a str or a dict, or a list if it is repeated.

    What follows is ignored. Of several equal keys in JSON the last one counts.

    :param source: the interface or field, for the log; None if the sender is not verified yet, for whom nothing is
        logged.
    :returns: None for anything else, a document type, and more than MAXIMUM_DEPTH levels.
    """
    text = UNSTORABLE.sub("\ufffd", content.decode(errors="replace")).strip(" \t\r\n\ufeff")
    try:
        if form == "xml":
            before, end, after = text.rpartition("</xml>")
            root = defusedxml.ElementTree.fromstring(before + end or after, forbid_dtd=True)
            document: Any = _children(root) if root.tag == "xml" else None
        else:
            document, _ = json.JSONDecoder(strict=False, parse_constant=str).raw_decode(text)
        cleaned = _clean(document, MAXIMUM_DEPTH)
    except (ValueError, ParseError, RecursionError):
        return None
    if source and ("\ufffd" in text or cleaned != document):
        logger.warning("WeChat sent malformed text", extra={"interface": source, "reason": "characters replaced"})
    return cleaned if isinstance(cleaned, dict) else None


def _children(element: Element) -> dict[str, Any]:
    values: dict[str, list[Any]] = {}
    for child in element:
        values.setdefault(child.tag, []).append(_children(child) if len(child) else child.text or "")
    return {name: several if len(several) > 1 else several[0] for name, several in values.items()}


def _clean(value: Any, levels: int) -> Any:
    """Copy a document, with U+FFFD for what cannot be stored.

    :raises ValueError: if it has more levels.
    """
    if isinstance(value, str):
        return UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict | list) and levels == 0:
        raise ValueError("Too deep.")
    if isinstance(value, dict):
        return {_clean(name, 0): _clean(item, levels - 1) for name, item in value.items()}
    return [_clean(item, levels - 1) for item in value] if isinstance(value, list) else value
