"""Every setting the service reads, declared once: name, type, default or required, help.

They come from the environment, and what it leaves unset from a file.
"""

import hashlib
import json
import os
import re
import socket
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate, validates_schema

VERSION = "0.1.0"
SOURCES = "*.py", "openapi*", "requirements.txt", "blueprints/*", "storage/**/*.py", "telemetry/*.py", "wechat/*.py"
"""The files that make a tree what it is, where no release.json names it."""
_ORIGIN = r"(https://[a-z0-9.-]+(?!:443\b)|http://[a-z0-9.-]+(?!:80\b))(:[0-9]{1,5})?"
# Of the options that the drivers know, the URLs take those that are known to work. A message must not quote a password.
_PORT = r"(?!6553[6-9]|655[4-9][0-9]|65[6-9][0-9]{2}|6[6-9][0-9]{3}|[7-9][0-9]{4})[0-9]{1,5}"
_NAME = r"(\[[0-9A-Fa-f:.]+\]|[^/?#@:,\[\]\s]+)"
_HOST = rf"{_NAME}(:{_PORT})?"
_SITE = rf"(?i:https?)://{_HOST}(/[^?#\s]*)?"
_MYSQL_OPTION = r"(charset=\w+|(unix_socket|ssl_(ca|capath|cert|key|cipher))=[^&]+|ssl_check_hostname=(true|false))"
_MYSQL_PATTERN = rf"(mysql|mariadb)(\+pymysql)?://([^@]*@)?({_HOST})?/[^/?]+(\?{_MYSQL_OPTION}(&{_MYSQL_OPTION})*)?"
DATABASE_PATTERN = rf"sqlite:///(?!:memory:)[^?]+|{_MYSQL_PATTERN}"
_REDIS_OPTION = r"(db=[0-9]+|socket_(connect_)?timeout=(?=[0-9.]*[1-9])[0-9]*\.?[0-9]+)"
_TLS_OPTION = r"ssl_((ca_certs|certfile|keyfile)=[^&#]+|cert_reqs=(none|optional|required)|check_hostname=(true|false))"
_REDIS_ADDRESS = rf"([^/?#]*@)?{_HOST}(/[0-9]*)?"
_SENTINEL_OPTION = rf"({_REDIS_OPTION}|replicas=[0-9]|sentinel_(username|password)=[^&#]+)"
_SENTINELS = rf"([^/?#]*@)?{_NAME}:{_PORT}(,{_NAME}:{_PORT})*/[A-Za-z0-9._-]+(/[0-9]*)?"
REDIS_PATTERN = (
    rf"(redis://{_REDIS_ADDRESS}|unix://[^?#\[]*/[^?#]+)(\?{_REDIS_OPTION}(&{_REDIS_OPTION})*)?"
    rf"|rediss://{_REDIS_ADDRESS}(\?({_REDIS_OPTION}|{_TLS_OPTION})(&({_REDIS_OPTION}|{_TLS_OPTION}))*)?"
    rf"|redis\+sentinel://{_SENTINELS}(\?{_SENTINEL_OPTION}(&{_SENTINEL_OPTION})*)?"
)
_KEY = "[A-Za-z0-9+/]{43}="
_RATE = "off|[1-9][0-9]{0,8}/(second|minute|hour|day)"
YEAR_SECONDS = 366 * 86400
# A line of the file: empty, a comment, or a setting, taken literally. What other readers of such files would expand or
# cut off must stand in single quotes. deploy/patch/supervisor.py has the same pattern.
_LINE = r"""\s*(?:#.*|(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:'([^']*)'|"([^"\\$]*)"|((?:[^'"\\$#]|(?<!\s)#)*?)))?\s*"""


class SettingsError(SystemExit):
    """Settings that the service needs are missing or malformed, or their file is.

    A SystemExit, so that every server prints the message and stops with a non-zero status and no traceback.
    """


def _required(text: str, pattern: str = ".*") -> fields.String:
    return fields.String(required=True, validate=_matches(pattern), metadata={"help": text})


def _matches(pattern: str) -> validate.Regexp:
    return validate.Regexp(rf"(?:{pattern})\Z", error="Malformed.")  # the help text says what is right


def _optional(text: str, pattern: str = ".*", default: str = "") -> fields.String:
    return fields.String(load_default=default, validate=_matches(pattern), metadata={"help": text})


def _list(text: str, item: str, convert: Callable[[str], Any] = str, **more: Any) -> fields.String:
    """Items that commas separate; each matches a pattern and is listed once."""

    def split(value: str) -> list[Any]:
        items = [part.strip() for part in value.split(",")]
        if len({*items}) == len(items) and all(re.fullmatch(item, part) for part in items):
            with suppress(ValueError):
                return [convert(part) for part in items]
        raise ValidationError("Malformed.")

    return fields.String(post_load=split, metadata={"help": text}, **(more or {"load_default": []}))


def _switch(text: str) -> fields.Boolean:
    return fields.Boolean(load_default=False, metadata={"help": text})


def _integer(default: int, minimum: int, maximum: int, text: str) -> fields.Integer:
    return fields.Integer(load_default=default, validate=validate.Range(minimum, maximum), metadata={"help": text})


class Settings(Schema):
    """One field per variable; `load` reads them. A field without a default is required."""

    ENV_FILE = _optional("File of settings, for what the environment leaves unset; default: .env beside settings.py.")
    WECHAT_APP_ID = _required("The mini-program's app id, from mp.weixin.qq.com.")
    WECHAT_APP_SECRET = _required("The mini-program's app secret, from the same page.")
    WECHAT_API_BASE_URL = _optional("Base URL of WeChat's server API.", _SITE, "https://api.weixin.qq.com")
    WECHAT_OPEN_BASE_URL = _optional("Base URL of WeChat's web login pages.", _SITE, "https://open.weixin.qq.com")
    WECHAT_ACCOUNT_APP_ID = _optional("The official account's app id for login in WeChat; default: the mini-program's.")
    WECHAT_ACCOUNT_APP_SECRET = _optional("Its app secret.")
    WECHAT_WEBSITE_APP_ID = _optional("The website's app id for login by QR code; default: the mini-program's.")
    WECHAT_WEBSITE_APP_SECRET = _optional("Its app secret.")
    WECHAT_PUSH_TOKEN = _optional("Token of message push, 3 to 32 letters and digits; else off.", "[A-Za-z0-9]{3,32}")
    WECHAT_PUSH_AES_KEY = _optional("Its EncodingAESKey, 43 letters and digits, if it is encrypted.", "[A-Za-z0-9]{43}")
    WECHAT_CONCURRENCY = _integer(1000, 1, 100_000, "Calls of WeChat that a worker makes at a time; more get 503.")
    WECHAT_CONTENT_CHECK = _switch("Whether nicknames are checked by WeChat's content check.")
    TRUST_WXCLOUD_HEADERS = _switch("Whether X-WX-OPENID names the user: safe only if cloud run is the only way in.")
    PUBLIC_URL = _optional("URL at which browsers reach this service; default: the address of each request.", _SITE)
    TRUSTED_PROXIES = _list("Comma-separated IPs or networks whose X-Forwarded headers count.", ".+", ip_network)
    CORS_ORIGINS = _list("Comma-separated origins whose pages may call the API: https://h5.example.com", _ORIGIN)
    REDIS_URL = _required(
        "The Redis, 6.2 or later, that all instances share: redis://:password@host:6379/0, rediss:// with TLS, or"
        " redis+sentinel://:password@host:26379,host:26379,host:26379/service/0; not a Cluster. Options: db,"
        " socket_timeout, socket_connect_timeout; ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_cert_reqs,"
        " ssl_check_hostname; sentinel_username, sentinel_password, replicas (that have a login; default 1).",
        REDIS_PATTERN,
    )
    DATABASE_URL = _required(
        "The database, such as mysql://user:password@host/kuaishang or sqlite:////data/kuaishang.db. Options of MySQL:"
        " unix_socket, ssl_ca, ssl_capath, ssl_cert, ssl_key, ssl_cipher, ssl_check_hostname; charset is utf8mb4.",
        DATABASE_PATTERN,
    )
    # No repetition of something short.
    SECRET_KEY = _required("32 random characters or more: openssl rand -base64 32", r"(?!(.+)\1+\Z).{32,}")
    SECRET_KEY_FALLBACKS = _list("Comma-separated; these verify signatures too: next or previous SECRET_KEY.", ".{32,}")
    ENCRYPTION_KEYS = _list("Comma-separated; first encrypts: openssl rand -base64 32", _KEY, b64decode, required=True)
    ADMIN_OPENIDS = _list("Comma-separated mini-program openids of administrators, while named.", "[A-Za-z0-9_-]+")
    SESSION_LIFETIME = _integer(3600, 60, YEAR_SECONDS, "Seconds after which an unused session ends, 60 or more.")
    SESSION_ABSOLUTE_LIFETIME = _integer(86400, 60, YEAR_SECONDS, "Seconds after which any session ends, 60 or more.")
    LOGIN_RATE = _optional("Logins of a client address, as N/second, minute, hour or day; or off.", _RATE, "10000/hour")
    APP_LOGIN_RATE = _optional("Logins of all clients that WeChat is asked about, or off.", _RATE, "10000/minute")
    SESSION_RATE = _optional("Requests of a session, or off.", _RATE, "36000/hour")
    HOST = fields.IP(load_default="0.0.0.0", metadata={"help": "The IP address to listen on; :: for IPv6 too."})  # noqa: S104
    PORT = _integer(8000, 1, 65535, "The TCP port to listen on.")
    WEB_CONCURRENCY = _integer(2, 1, 256, "Worker processes, 1 to 256.")
    WEB_CONNECTIONS = _integer(5000, 100, 100_000, "Client connections that a worker holds at once, 100 or more.")
    REQUESTS_IN_FLIGHT = _integer(128, 10, 100_000, "Requests at once per worker, waits for WeChat aside; 10 or more.")
    DATABASE_CONNECTIONS = _integer(16, 1, 256, "Database connections of a worker, 1 to 256.")
    REQUEST_SECONDS = _integer(10, 1, 300, "Seconds that a request may take; X-Request-Timeout may ask for less.")
    HEAD_SECONDS = _integer(10, 1, 300, "Seconds that a client has to send the headers, from the first byte.")
    BODY_SECONDS = _integer(8, 1, 300, "Seconds that a client has to send a body, and to take each part of a response.")
    DRAIN_SECONDS = _integer(3, 0, 12, "Seconds that a stopping service still serves while /readyz is 503, 0 to 12.")
    DOCS = _switch("Whether /docs, the page to try the API on, is served.")
    METRICS_TOKEN = _list("Comma-separated bearer tokens of /metrics, 16 or more ASCII characters each.", "[!-~]{16,}")
    OTEL_EXPORTER_OTLP_ENDPOINT = _optional("Trace collector: http://collector:4318; other OTEL_… apply, too.", _SITE)
    LOG_LEVEL = _optional("Minimum: DEBUG, INFO (with requests), WARNING or ERROR.", "DEBUG|INFO|WARNING|ERROR", "INFO")

    @validates_schema
    def _belong_together(self, settings: dict[str, Any], **kwargs: Any) -> None:
        needs = [("WECHAT_PUSH_AES_KEY", "WECHAT_PUSH_TOKEN")]
        for app in ("WECHAT_ACCOUNT_APP", "WECHAT_WEBSITE_APP"):
            needs += [(f"{app}_ID", f"{app}_SECRET"), (f"{app}_SECRET", f"{app}_ID")]
        for name, other in needs:
            if settings.get(name) and not settings.get(other):
                raise ValidationError(f"Required because {name} is set.", other)
        if settings.get("SESSION_LIFETIME", 0) > settings.get("SESSION_ABSOLUTE_LIFETIME", 0):
            raise ValidationError("Must not exceed SESSION_ABSOLUTE_LIFETIME.", "SESSION_LIFETIME")


def variables() -> dict[str, str]:
    """Return the environment, and from the file of ENV_FILE what that leaves unset or empty.

    The file is read at each call, and nothing of it gets into os.environ, which would win over the file at a reload.

    :raises SettingsError: if the file is malformed, cannot be read, or others than its owner can open it.
    """
    environ = {name: value for name, value in os.environ.items() if value.strip()}
    path = Path(environ.get("ENV_FILE") or Path(__file__).with_name(".env"))
    if "ENV_FILE" not in environ and not path.exists():
        return environ
    try:
        lines, status = path.read_text(encoding="utf-8").splitlines(), path.stat()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {getattr(error, 'strerror', 'it is not UTF-8')}") from None
    # PostgreSQL's rule for the file of its key: the group may read what belongs to root.
    if path.is_file() and status.st_mode & (0o037 if status.st_uid == 0 else 0o077):
        raise SettingsError(f"{path} holds secrets, and others can open it: chmod 600, or 640 if it is root's")
    pairs = [re.fullmatch(_LINE, line) for line in lines]
    if None in pairs:
        raise SettingsError(f"{path}, line {pairs.index(None) + 1}: not NAME=value, or needs quotes: NAME='value'")
    return {pair[1]: value for pair in pairs if pair and pair.lastindex and (value := pair[pair.lastindex])} | environ


def _release() -> dict[str, str]:
    """Return what runs here: version, commit, and when it was built and started, in RFC 3339 and UTC.

    A release has a release.json. Any other tree is built as it starts, and its commit is a hash of its files.
    """
    folder, now = Path(__file__).parent, datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError, ValueError):
        return {**json.loads((folder / "release.json").read_bytes()), "started": now}
    files = sorted(path for pattern in SOURCES for path in folder.glob(pattern) if path.is_file())
    commit = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return {"version": VERSION, "commit": commit, "built": now, "started": now}


def load(environ: Mapping[str, str] | None = None, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the settings; an empty variable counts as not set.

    :param environ: where from; by default, what `variables` returns.
    :param only: the names of the settings to read; all by default.
    :returns: the settings by name, parsed; and what names this process: INSTANCE, RELEASE and VERSION.
    :raises SettingsError: with one message that lists every missing or malformed setting with its help.
    """
    try:
        found = variables() if environ is None else environ
        given = {name: value.strip() for name, value in found.items() if value.strip()}
        loaded: dict[str, Any] = Settings(only=only).load(given, unknown=EXCLUDE)
        # In logs, traces and metrics.
        names = {"INSTANCE": f"{socket.gethostname()}:{loaded.get('PORT')}", "RELEASE": (release := _release())}
        return loaded | names | {"VERSION": f"{release['version']}+{release['commit']}"}
    except ValidationError as error:
        lines = ["The service cannot start: these settings are missing or malformed in its environment and file."]
        for name, messages in error.normalized_messages().items():  # they say what is wrong, never the value
            field = Settings().fields[name]
            wrong = "missing" if messages == [field.error_messages["required"]] else " ".join(messages)
            lines.append(f"  {name}: {wrong} ({field.metadata['help']})")
        raise SettingsError("\n".join(lines)) from None
