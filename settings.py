"""Every environment variable the service reads, declared once: name, type, default or required, help."""

import base64
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis.connection
import sqlalchemy
from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate, validates_schema

VERSION = "0.1.0"


class SettingsError(SystemExit):
    """The environment does not hold what the service needs.

    A SystemExit, because no server can do anything about it: each of them prints the message and stops,
    without a traceback and with a status that is not 0.
    """


class EncryptionKeys(fields.Field[list[bytes]]):
    """Comma-separated base64 of 32 random bytes each."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> list[bytes]:
        try:
            keys = [base64.b64decode(key.strip(), validate=True) for key in value.split(",")]
        except ValueError:
            raise ValidationError("Not base64.") from None
        if any(len(key) != 32 for key in keys):
            raise ValidationError("Each key must be the base64 of exactly 32 bytes.")
        return keys


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _url(pattern: str, parse: Callable[[str], object], error: str) -> Callable[[str], None]:
    """Accept what matches and can be parsed; what a parser says of the rest may hold a password, so it is not shown."""

    def validator(value: str) -> None:
        try:
            parsed = re.match(pattern, value) and parse(value)
        except (ValueError, TypeError, sqlalchemy.exc.ArgumentError):
            parsed = None
        if not parsed:
            raise ValidationError(error)

    return validator


def _seconds(default: int, text: str) -> fields.Integer:
    return fields.Integer(load_default=default, validate=validate.Range(60, 366 * 86400), metadata=_help(text))


def _site(default: str, text: str) -> fields.Url:
    return fields.Url(schemes={"http", "https"}, require_tld=False, load_default=default, metadata=_help(text))


def _optional(text: str, pattern: str = ".*", error: str = "") -> fields.String:
    return fields.String(
        load_default="", validate=validate.Regexp(rf"({pattern})\Z", error=error), metadata=_help(text)
    )


def _switch(text: str) -> fields.Boolean:
    return fields.Boolean(load_default=False, metadata=_help(text))


def _count(default: int, maximum: int, text: str) -> fields.Integer:
    return fields.Integer(load_default=default, validate=validate.Range(1, maximum), metadata=_help(text))


class Settings(Schema):
    """One field a variable; `load` reads them. A field without a default is required."""

    class Meta:
        unknown = EXCLUDE  # the environment holds much that is not ours

    WECHAT_APP_ID = fields.String(required=True, metadata=_help("The mini-program's app id, from mp.weixin.qq.com."))
    WECHAT_APP_SECRET = fields.String(
        required=True, metadata=_help("The mini-program's app secret, from the same page.")
    )
    WECHAT_API_BASE_URL = _site("https://api.weixin.qq.com", "Where WeChat's server API answers.")
    WECHAT_OPEN_BASE_URL = _site("https://open.weixin.qq.com", "Where WeChat's pages for login on the web are.")
    WECHAT_ACCOUNT_APP_ID = _optional(
        "The official account for login on the web inside WeChat; the mini-program's app id if empty."
    )
    WECHAT_ACCOUNT_APP_SECRET = _optional("Its app secret.")
    WECHAT_WEBSITE_APP_ID = _optional(
        "The website application for login by QR code; the mini-program's app id if empty."
    )
    WECHAT_WEBSITE_APP_SECRET = _optional("Its app secret.")
    WECHAT_PUSH_TOKEN = _optional(
        "The message push's token, as set at mp.weixin.qq.com; without it nothing is accepted.",
        "[A-Za-z0-9]{3,32}",
        "Not 3 to 32 letters and digits.",
    )
    WECHAT_PUSH_AES_KEY = _optional(
        "The message push's EncodingAESKey: with it only encrypted messages are accepted, without it only plain ones.",
        "[A-Za-z0-9]{43}",
        "Not 43 letters and digits.",
    )
    WECHAT_CONTENT_CHECK = _switch("Whether nicknames go through WeChat's content check.")
    TRUST_WXCLOUD_HEADERS = _switch(
        "Whether X-WX-OPENID says who calls: only where nobody reaches the service but through WeChat cloud run."
    )
    PUBLIC_URL = _site("", "Where browsers reach this service; if empty, the address that a request came to.")
    REDIS_URL = fields.String(
        required=True,
        validate=_url(r"(redis|rediss|unix)://.", redis.connection.parse_url, "Not a redis:// or unix:// URL."),
        metadata=_help("The Redis that all instances share, such as redis://:password@host:6379/0."),
    )
    DATABASE_URL = fields.String(
        required=True,
        validate=_url(
            r"sqlite:///(?!:memory:).|(mysql|mariadb)(\+pymysql)?://.",
            sqlalchemy.make_url,
            "Not a sqlite:///path or mysql:// URL.",
        ),
        metadata=_help(
            "The SQL database, such as mysql://user:password@host/kuaishang or sqlite:////data/kuaishang.db."
        ),
    )
    SECRET_KEY = fields.String(
        required=True,
        validate=validate.Length(min=32),
        metadata=_help("Flask's signing key, 32 characters or more: openssl rand -base64 32"),
    )
    ENCRYPTION_KEYS = EncryptionKeys(
        required=True,
        metadata=_help(
            "Comma-separated keys for data at rest, the first encrypts and all decrypt; each: openssl rand -base64 32"
        ),
    )
    ADMIN_OPENIDS = _optional(
        "Comma-separated openids of the mini-program whose users become administrators when they log in.",
        "[A-Za-z0-9_-]+( *, *[A-Za-z0-9_-]+)*",
        "Not openids, separated by commas.",
    )
    SESSION_LIFETIME = _seconds(3600, "Seconds after which an unused session ends, 60 or more.")
    SESSION_ABSOLUTE_LIFETIME = _seconds(
        86400, "Seconds after which a session ends however much it is used, 60 or more."
    )
    PORT = _count(8000, 65535, "The TCP port to listen on.")
    WEB_CONCURRENCY = _count(2, 256, "Worker processes, 1 to 256.")
    WEB_THREADS = _count(16, 256, "Threads a worker, 1 to 256: the requests that one process serves at once.")
    DRAIN_SECONDS = fields.Integer(
        load_default=3,
        validate=validate.Range(0, 12),
        metadata=_help("Seconds for which a stopping service still serves while /readyz answers 503, 0 to 12."),
    )
    METRICS_TOKEN = _optional(
        "What Prometheus brings as bearer token to /metrics, 16 characters or more; without it there is no /metrics.",
        "[!-~]{16,}",
        "Not 16 or more characters of ASCII.",
    )
    OTEL_EXPORTER_OTLP_ENDPOINT = _site(
        "",
        "Where traces are sent, such as http://collector:4318; OTEL_ variables of samplers, batches and headers count.",
    )
    LOG_LEVEL = fields.String(
        load_default="INFO",
        validate=validate.OneOf(["DEBUG", "INFO", "WARNING", "ERROR"]),
        metadata=_help("The least level that is logged: DEBUG, INFO, WARNING or ERROR; requests are INFO."),
    )

    @validates_schema
    def _belong_together(self, settings: dict[str, Any], **kwargs: Any) -> None:
        pairs = {
            "WECHAT_ACCOUNT_APP_ID": "WECHAT_ACCOUNT_APP_SECRET",
            "WECHAT_WEBSITE_APP_ID": "WECHAT_WEBSITE_APP_SECRET",
        }
        needs = {
            **pairs,
            **{secret: name for name, secret in pairs.items()},
            "WECHAT_PUSH_AES_KEY": "WECHAT_PUSH_TOKEN",
        }
        for name, other in needs.items():
            if settings.get(name) and not settings.get(other):
                raise ValidationError(f"Needed, as {name} is set.", other)


def load(environ: Mapping[str, str], only: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the settings from an environment; an empty variable counts as not set.

    :param only: the names of those that are wanted; all of them by default.
    :returns: the settings by name, parsed.
    :raises SettingsError: with one message that lists all that is missing or malformed, each with its help.
    """
    try:
        given = {name: value for name, value in environ.items() if value.strip()}
        loaded: dict[str, Any] = Settings(only=only).load(given)
        return loaded
    except ValidationError as error:
        raise SettingsError(_explain(error.normalized_messages())) from None


def instance(port: int) -> str:
    """What tells this instance from the others in logs and traces."""
    return f"{socket.gethostname()}:{port}"


def _explain(problems: dict[str, list[str]]) -> str:
    """Say for each setting what is wrong and what it is for, never what it was set to."""
    declared = Settings().fields
    lines = ["The service cannot start: these settings are missing or malformed in its environment."]
    for name, messages in problems.items():
        field = declared[name]
        missing = messages == [field.error_messages["required"]]
        lines.append(f"  {name}: {'missing' if missing else ' '.join(messages)} ({field.metadata['help']})")
    return "\n".join(lines)
