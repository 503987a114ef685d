"""What a log line may hold, in the order in which it is written; `deploy/logging` maps the same for Elasticsearch.

A field that is not named here stays out of the line, which names it under `undeclared`. To log something new, add it.
"""

FIELDS = {
    "timestamp": "date",  # RFC 3339, UTC, milliseconds
    "level": "keyword",
    "service": "keyword",
    "traceId": "keyword",
    "message": "text",
    "spanId": "keyword",
    "parentSpanId": "keyword",
    "method": "keyword",
    "route": "keyword",  # the template
    "status": "integer",
    "code": "integer",
    "durationMs": "float",
    "userId": "long",
    "instance": "keyword",
    "version": "keyword",
    "logger": "keyword",
    "pid": "integer",
    "exceptionType": "keyword",
    "exceptionMessage": "text",
    "stack": "text",
    "reason": "text",
    "interface": "keyword",  # of WeChat's
    "errcode": "integer",
    "expiresIn": "integer",
    "forced": "boolean",
    "function": "keyword",
    "failures": "integer",
    "inHand": "integer",
    "type": "keyword",
    "event": "keyword",
    "repeat": "boolean",
    "handlers": "integer",
    "columns": "keyword",
    "aboutUserId": "long",
    "mergedUserId": "long",
    "dropped": "integer",
    "undeclared": "keyword",
}
"""Each field's type in Elasticsearch's words."""
