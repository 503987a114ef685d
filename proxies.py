"""What the proxies of TRUSTED_PROXIES say of a request: the client's address, and the scheme and host it asked for.

werkzeug's ProxyFix counts proxies and asks nobody's address, so anybody who reaches the service past one could choose
all three.
"""

import ipaddress
import re
from contextlib import suppress
from functools import partial
from typing import Any

from flask import Flask

_HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, one of IPv4 also if it is written as IPv6; None if it is malformed."""
    with suppress(ValueError):
        address = ipaddress.ip_address(text)
        return getattr(address, "ipv4_mapped", None) or address
    return None


def _see_through(wsgi_app: Any, trusted: list[Any], environ: dict[str, Any], start_response: Any) -> Any:
    """Serve a request as its client made it. A peer without an address, at a Unix socket, is a proxy."""

    def is_proxy(address: Any) -> bool:
        return address is not None and any(address in network for network in trusted)

    peer = environ.get("REMOTE_ADDR", "")
    if not peer or is_proxy(parse_address(peer)):
        for entry in reversed(environ.get("HTTP_X_FORWARDED_FOR", "").split(",")):
            address = parse_address(entry.strip())
            if address is None:
                break
            environ["REMOTE_ADDR"] = str(address)
            if not is_proxy(address):
                break  # what is left of it, the client itself may have sent
        # Of several values, the last one is the peer's own.
        scheme, host = (
            environ.get(f"HTTP_X_FORWARDED_{name}", "").split(",")[-1].strip() for name in ("PROTO", "HOST")
        )
        if scheme.lower() in ("http", "https"):
            environ["wsgi.url_scheme"] = scheme.lower()
        if _HOST.fullmatch(host):
            environ["HTTP_HOST"] = host
    return wsgi_app(environ, start_response)


def init_app(app: Flask) -> None:
    if app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = partial(_see_through, app.wsgi_app, app.config["TRUSTED_PROXIES"])  # type: ignore[method-assign]
