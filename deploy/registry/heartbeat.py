"""Says in etcd that an instance is alive, beside it: for as long as it responds to /livez, its lease is renewed.

    python3 heartbeat.py 10.1.0.11:8000

The address is the one at which HAProxy reaches the instance, and this program, too. The instance is registered as soon
as `/readyz` is 200. Then `/livez` is asked each `--seconds` (5); a lease lasts three times that, so that an instance
which has died, hangs or is cut off from etcd is out after three misses. Whether it is ready is for HAProxy to ask.

SIGTERM says that it leaves: no new requests come, and no alarm. While etcd is away nothing changes; when it is back and
knows nothing of the lease, there is a new one.
"""

import argparse
import http.client
import signal
import threading
import time
import urllib.request

from etcd import SECONDS, Away, Etcd, is_address

PREFIX = "/kuaishang/instances/"
MISSES = 3
UP, LEAVING = "up", "leaving"
"""What stands in etcd under the address of an instance."""


class Heartbeat:
    """The lease of one instance.

    :param seconds: between two beats.
    """

    def __init__(self, etcd: Etcd, prefix: str, address: str, seconds: int) -> None:
        self._etcd, self._address, self._seconds = etcd, address, seconds
        self._key = prefix + address
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.lease: str | None = None

    def beat(self) -> str:
        """Renew the lease if the instance is alive, or begin one if it is ready.

        :returns: what is so now.
        """
        probe = "/livez" if self.lease else "/readyz"
        try:
            with self._opener.open(f"http://{self._address}{probe}", timeout=SECONDS):
                pass
        except (OSError, http.client.HTTPException) as error:
            return f"not renewed, {probe}: {error}"
        try:
            if self.lease and not self._etcd.renew(self.lease):
                self.lease = None
                return "the lease has expired"
            if not self.lease:
                lease = self._etcd.grant(MISSES * self._seconds)
                self._etcd.put(self._key, UP, lease)
                self.lease = lease
        except Away as away:
            return f"etcd is away, {away}"
        return "registered"

    def leave(self) -> str:
        """Say that no new requests should come; what says so goes with the lease."""
        try:
            if self.lease:
                self._etcd.put(self._key, LEAVING, self.lease)
        except Away as away:
            return f"etcd does not know that it leaves, {away}"
        return "leaving"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", help="IP address and port of the instance")
    parser.add_argument("--prefix", default=PREFIX, help="of the keys in etcd; one for each group of instances")
    parser.add_argument("--seconds", type=int, default=5, help="between two beats")
    options = parser.parse_args()
    if not is_address(options.address):
        parser.error(f"{options.address}: want an IP address and a port, such as 10.1.0.11:8000")
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    heartbeat = Heartbeat(Etcd.from_environment(), options.prefix, options.address, options.seconds)
    said, due = "", time.monotonic()
    while not stopped.wait(max(due - time.monotonic(), 0)):
        due = time.monotonic() + options.seconds
        if (outcome := heartbeat.beat()) != said:
            print(f"{options.address}: {outcome}", flush=True)
            said = outcome
    print(f"{options.address}: {heartbeat.leave()}", flush=True)


if __name__ == "__main__":
    main()
