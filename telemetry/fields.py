"""The fields of a log line by their Elasticsearch type; `deploy/logging` maps the same.

A field that is not declared here stays out of the line, which names it under `undeclared`.
"""

SERVICE = "kuaishang"
"""The field `service` of every line, and the `service.name` of every span."""

_BY_TYPE = {
    "date": "timestamp since",  # RFC 3339, UTC
    "keyword": "level service traceId spanId parentSpanId method route interface type event function columns "
    "exceptionType undeclared instance version logger by",  # route: the template
    "text": "message reason exceptionMessage stack",
    "long": "status code errcode expiresIn pending handlers pid userId aboutUserId mergedUserId",
    "float": "durationMs",
    "boolean": "forced repeat",
}
FIELDS = {name: kind for kind, names in _BY_TYPE.items() for name in names.split()}
