"""etcd 3.4 or later through its JSON gateway, with the standard library alone."""

import base64
import http.client
import ipaddress
import json
import os
import re
import ssl
import urllib.request
from typing import Any

SECONDS = 2
"""How long an endpoint may take."""


class Away(Exception):
    """No endpoint has done what it was asked for; the text says why the last one has not."""


class Etcd:
    """One etcd at several endpoints: the one that responded last is asked first.

    :param endpoints: such as https://10.1.0.1:2379, the members of one cluster.
    :param context: for TLS.
    """

    def __init__(self, endpoints: list[str], context: ssl.SSLContext | None = None) -> None:
        self._endpoints = list(endpoints)
        https = urllib.request.HTTPSHandler(context=context)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), https)

    @classmethod
    def from_environment(cls) -> "Etcd":
        """Use the variables that etcdctl uses: ETCDCTL_ENDPOINTS, and for TLS ETCDCTL_CACERT, _CERT and _KEY."""
        context = ssl.create_default_context(cafile=os.environ.get("ETCDCTL_CACERT"))
        if os.environ.get("ETCDCTL_CERT"):
            context.load_cert_chain(os.environ["ETCDCTL_CERT"], os.environ.get("ETCDCTL_KEY"))
        return cls(os.environ.get("ETCDCTL_ENDPOINTS", "http://127.0.0.1:2379").split(","), context)

    def call(self, method: str, **fields: Any) -> Any:
        """Call a method of the gateway, such as `kv/range`.

        :raises Away: if no endpoint has answered with success; it may have been done.
        """
        reason: object = None
        for _ in range(len(self._endpoints)):
            request = urllib.request.Request(f"{self._endpoints[0]}/v3/{method}", json.dumps(fields).encode())
            try:
                with self._opener.open(request, timeout=SECONDS) as answer:
                    body = json.load(answer)
                return body.get("result", body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{self._endpoints[0]}: {error}"
                self._endpoints.append(self._endpoints.pop(0))
        raise Away(reason)

    def grant(self, seconds: int) -> str:
        """Return a new lease of so many seconds."""
        return str(self.call("lease/grant", TTL=seconds)["ID"])

    def renew(self, lease: str) -> bool:
        """Renew a lease; False if it has expired."""
        return int(self.call("lease/keepalive", ID=lease).get("TTL", 0)) > 0

    def put(self, key: str, value: str, lease: str) -> None:
        """Set a key for as long as its lease lasts."""
        self.call("kv/put", key=_encoded(key), value=_encoded(value), lease=lease)

    def list(self, prefix: str) -> dict[str, str]:
        """Return what is stored under a prefix, without it: as a majority of the members knows it."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found = self.call("kv/range", key=_encoded(prefix), range_end=_encoded(end)).get("kvs", [])
        return {_decoded(one["key"]).removeprefix(prefix): _decoded(one.get("value", "")) for one in found}


def is_address(text: str) -> bool:
    """Whether it is an IP address and a port, `10.0.0.1:8000` or `[fd00::1]:8000`, and nothing that means more."""
    host, _, port = text.rpartition(":")
    try:
        bare = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    # The scope after a % may hold anything.
    return text == join(str(bare), port) and "%" not in text and bool(re.fullmatch("[1-9][0-9]{0,4}", port))


def join(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode(errors="replace")
