"""The fields of a log line, in their order and by their Elasticsearch type; `deploy/logging` maps the same.

A field that is not declared here stays out of the line, which names it under `undeclared`.
"""

SERVICE = "kuaishang"
"""The field `service` of every line, and the `service.name` of every span."""

_BY_TYPE = (
    ("date", "timestamp"),  # RFC 3339, UTC
    ("keyword", "level service traceId"),
    ("text", "message"),
    ("keyword", "spanId parentSpanId method route interface type event function columns"),  # route: the template
    ("long", "status code errcode expiresIn pending handlers pid userId aboutUserId mergedUserId"),
    ("float", "durationMs"),
    ("boolean", "forced repeat"),
    ("text", "reason exceptionMessage stack"),
    ("keyword", "exceptionType undeclared instance version logger"),
)
FIELDS = {name: kind for kind, names in _BY_TYPE for name in names.split()}
