"""Log lines: one JSON object each, on stdout, carrying the trace id of the request they belong to."""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from pythonjsonlogger.json import JsonFormatter

trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""The trace id of the request that is being served, 32 hex digits; None outside of one."""


class JsonLineFormatter(JsonFormatter):
    """`timestamp` (RFC 3339, UTC, milliseconds), `level`, `service`, `traceId`, `message`, then the extra fields."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        moment = datetime.fromtimestamp(record.created, UTC)
        log_data["timestamp"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        log_data["level"] = record.levelname
        log_data["service"] = "kuaishang"
        log_data["traceId"] = trace_id.get()
        log_data["message"] = record.getMessage()
        super().add_fields(log_data, record, message_dict)


def configure(level: str) -> None:
    """Send every logger's lines of at least this level to stdout.

    :param level: the name of a level of the logging module.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLineFormatter(json_ensure_ascii=False))
    logging.basicConfig(level=level, handlers=[handler], force=True)
