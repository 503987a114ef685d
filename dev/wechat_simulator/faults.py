"""What goes wrong on WeChat's side, on demand."""

import socket
import time
from collections.abc import Iterator

from flask import Response, request

from dev.wechat_simulator.wire import Refused, refusal
from dev.wechat_simulator.world import Fault

FAULTS = ("slow", "trickle", "errcode", "http_500", "not_json", "close")


def spoil(fault: Fault) -> Response | None:
    """Answer wrongly, or nothing if the call goes on."""
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return None
    if fault.kind == "trickle":
        return Response(_trickle(fault.seconds), content_type="text/plain")
    if fault.kind == "errcode":
        return refusal(Refused(fault.errcode))
    if fault.kind == "http_500":
        return Response("<html><body>Internal Server Error</body></html>", 500, content_type="text/html")
    if fault.kind == "not_json":
        return Response("<html>此页面暂时无法访问</html>", content_type="text/html; charset=utf-8")
    request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return Response()  # to nobody


def _trickle(seconds: float) -> Iterator[bytes]:
    """An answer that never stops for long and takes its time all the same."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield b" "
        time.sleep(0.1)
