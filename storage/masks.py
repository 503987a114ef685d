"""Masks: how much of personal data an API response may show."""

import re
import unicodedata
from functools import partial

_LABEL = "[A-Za-z0-9-]{0,61}[A-Za-z0-9]"
_DOMAIN = re.compile(rf"([A-Za-z0-9]({_LABEL})?\.)+[A-Za-z]{_LABEL}")  # RFC 1034; the last label is no number


def _mask(pattern: str, text: str) -> str:
    """Replace the second of the three groups of a pattern by stars, or all of a text that does not match."""
    first, hidden, last = found.groups() if (found := re.fullmatch(pattern, text)) else ("", text, "")
    return first + "*" * len(hidden) + last


mask_phone = partial(_mask, r"([0-9]{3})([0-9]{4})([0-9]{4})")
"""`138****5678` for 11 digits; anything else becomes stars."""

mask_id_card = partial(_mask, r"([0-9]{3})([0-9]{11})([0-9]{3}[0-9Xx])")
"""`110***********002X` for 17 digits and a digit or X; anything else becomes stars."""

mask_bank_card = partial(_mask, r"()([0-9]{8,15})([0-9]{4})")
"""`************1234` for 12 to 19 digits; anything else becomes stars."""


def mask_name(name: str) -> str:
    """`张**`: the first character, and a star for each other one; a single character becomes a star."""
    initial = _initial(name)
    return initial + "*" * (len(name) - len(initial))


def mask_email(email: str) -> str:
    """`z***@example.com`, always with three stars; `***@example.com` if only one character stands before the @.

    Without exactly one @, a local part and an ASCII domain, everything becomes stars.
    """
    local, _, domain = email.partition("@")
    if local and len(domain) <= 253 and _DOMAIN.fullmatch(domain):
        return f"{_initial(local)}***@{domain}"
    return "*" * len(email)


def _initial(text: str) -> str:
    """Return the first character if others follow it; spaces, accents and joiners do not count as others."""
    return text[:1] if any(unicodedata.category(character)[0] in "LNPS" for character in text[1:]) else ""
