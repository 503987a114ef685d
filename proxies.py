"""What the proxies of TRUSTED_PROXIES say of a request: its client's address, and the scheme and host it asked for.

werkzeug's ProxyFix counts proxies and looks at nobody's address, so whoever reaches the service past one could choose
all three.
"""

from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from flask import Flask


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return an IP address, one of IPv4 also if it is written as IPv6; None if it is malformed."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _see_through(wsgi_app: Any, trusted: list[Any], environ: dict[str, Any], start_response: Any) -> Any:
    """Serve a request as its client made it. A peer without an address, at a Unix socket, is a proxy."""

    def is_proxy(peer: str) -> bool:
        address = parse_address(peer)
        return any(address in network for network in trusted) if address else not peer

    if is_proxy(environ["REMOTE_ADDR"]):
        hops = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        # Each proxy adds whom it was called by. What comes before the last client, that client may have made up.
        while hops and is_proxy(environ["REMOTE_ADDR"]) and (hop := parse_address(hops.pop().strip())):
            environ["REMOTE_ADDR"] = str(hop)
        for header, name in (("PROTO", "wsgi.url_scheme"), ("HOST", "HTTP_HOST")):
            if value := environ.get(f"HTTP_X_FORWARDED_{header}", "").split(",")[-1].strip():
                environ[name] = value
    return wsgi_app(environ, start_response)


def init_app(app: Flask) -> None:
    if app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = partial(_see_through, app.wsgi_app, app.config["TRUSTED_PROXIES"])  # type: ignore[method-assign]
