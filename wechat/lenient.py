"""Reads JSON and XML as WeChat sends them, at times with control characters, broken UTF-8 or half an emoji.

What is returned can be stored and written again: such characters have become U+FFFD. A signature is verified before, on
the text as it came. Our own callers' JSON is read strictly, in blueprints/parsing.py.
"""

import html
import json
import logging
import re
from typing import Any, Literal
from xml.etree.ElementTree import Element, ParseError
from xml.sax.saxutils import escape

import defusedxml.ElementTree

logger = logging.getLogger(__name__)

Form = Literal["json", "xml"]
MAXIMUM_DEPTH = 32
"""The deepest nesting allowed; WeChat sends about five levels."""
UNSTORABLE = re.compile("[^\t\n\r\u0020-\u007e\u0080-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 forbids, and DEL."""

_JSON_ESCAPE = re.compile(r"\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|\\(?:u\w{4}|.)", re.DOTALL)
_XML_REFERENCE = re.compile(r"<!\[CDATA\[.*?(?:\]\]>|\Z)|&(?:#?\w{1,32};)?", re.DOTALL)
_DAMAGED_FIELD = re.compile(r'[<"](\w{1,40})(?:"\s*:\s*"|>(?:<!\[CDATA\[)?)[^"<]*\ufffd', re.ASCII)


def read(content: bytes | str, source: str | None, form: Form = "json") -> dict[str, Any] | None:
    """Read a JSON object, or the children of an <xml> element: each a str or a dict, or a list if it is repeated.

    What follows is ignored. Of several equal keys in JSON the last one counts. In XML references to anything but
    characters are text.

    :param source: the interface or field, for the log; None if the sender is not verified yet, for whom no escape is
        repaired, as that takes time, and nothing is logged.
    :returns: None for anything else, a document type, and more than MAXIMUM_DEPTH levels.
    """
    text = _clean(content if isinstance(content, str) else content.decode(errors="replace")).strip(" \t\r\n\ufeff")
    try:
        if form == "xml":
            text = _XML_REFERENCE.sub(_clean_reference, text) if source else text
            before, end, after = text.rpartition("</xml>")
            root = defusedxml.ElementTree.fromstring(before + end or after, forbid_dtd=True)
            document: Any = _children(root) if root.tag == "xml" else None
        else:
            text = _JSON_ESCAPE.sub(_clean_escape, text) if source else text
            document, _ = json.JSONDecoder(strict=False, parse_constant=str).raw_decode(text)
    except (ValueError, ParseError, RecursionError):
        return None
    if not isinstance(document, dict) or _is_deeper(document, MAXIMUM_DEPTH):
        return None
    if source and "\ufffd" in text:
        reason = f"characters replaced in {', '.join(sorted(set(_DAMAGED_FIELD.findall(text)))) or 'a field'}"
        logger.warning("WeChat sent malformed text", extra={"interface": source, "reason": reason})
    return document


def _clean(text: str) -> str:
    return UNSTORABLE.sub("\ufffd", text)


def _clean_escape(match: re.Match[str]) -> str:
    return json.dumps(_clean(json.loads(f'"{match[0]}"')), ensure_ascii=False)[1:-1]


def _clean_reference(match: re.Match[str]) -> str:
    # html.unescape leaves nothing of a control character. A bare \r would be read as a line feed.
    return match[0] if match[0][0] == "<" else escape(_clean(html.unescape(match[0]) or "\0"), {"\r": "&#13;"})


def _children(element: Element) -> dict[str, Any]:
    values: dict[str, list[Any]] = {}
    for child in element:
        values.setdefault(child.tag, []).append(_children(child) if len(child) else child.text or "")
    return {name: several if len(several) > 1 else several[0] for name, several in values.items()}


def _is_deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(item, levels - 1) for item in items)
