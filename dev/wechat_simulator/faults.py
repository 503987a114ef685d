"""WeChat's faults, on demand."""

import socket
import time
from collections.abc import Iterator

from flask import Response, request

from dev.wechat_simulator.wire import Refused, error_response
from dev.wechat_simulator.world import Fault

FAULTS = ("slow", "trickle", "errcode", "http_500", "not_json", "close")


def apply_fault(fault: Fault) -> Response | None:
    """Respond as the fault demands; None if the call is to be handled normally."""
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return None
    if fault.kind == "trickle":
        return Response(_trickle(fault.seconds), content_type="text/plain")
    if fault.kind == "errcode":
        return error_response(Refused(fault.errcode))
    if fault.kind == "http_500":
        return Response("<html><body>Internal Server Error</body></html>", 500, content_type="text/html")
    if fault.kind == "not_json":
        return Response("<html>此页面暂时无法访问</html>", content_type="text/html; charset=utf-8")
    request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return Response()  # cannot be sent


def _trickle(seconds: float) -> Iterator[bytes]:
    """A response that arrives steadily but slowly."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield b" "
        time.sleep(0.1)
