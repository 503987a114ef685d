import base64
import json
import os
import re
import runpy
import shutil
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

import settings
from deploy.patch.supervisor import read_env
from settings import Settings, SettingsError, load
from tests.harness import ROOT

COMPLETE = {
    "WECHAT_APP_ID": "wx1",
    "WECHAT_APP_SECRET": "secret",
    "REDIS_URL": "redis://localhost",
    "DATABASE_URL": "sqlite:///x.db",
    "SECRET_KEY": "0123456789abcdefghijklmnopqrstuv",
    "ENCRYPTION_KEYS": base64.b64encode(bytes(32)).decode(),
}


def test_every_setting_has_a_help_text_and_those_without_a_sane_default_are_required() -> None:
    fields = Settings().fields
    assert all(field.metadata["help"] for field in fields.values())
    assert {name for name, field in fields.items() if field.required} == set(COMPLETE)


def test_unset_settings_get_their_defaults() -> None:
    loaded = load(COMPLETE)
    assert loaded["SESSION_LIFETIME"] == 3600
    assert loaded["WECHAT_API_BASE_URL"] == "https://api.weixin.qq.com"
    assert set(loaded) == {*Settings().fields, "INSTANCE", "RELEASE", "VERSION"}


def test_all_missing_settings_are_listed_with_their_help() -> None:
    with pytest.raises(SettingsError) as caught:
        load({})
    for name, field in Settings().fields.items():
        assert (f"{name}: missing ({field.metadata['help']})" in str(caught.value)) == field.required


def test_an_empty_variable_is_missing() -> None:
    with pytest.raises(SettingsError, match="WECHAT_APP_ID: missing"):
        load({**COMPLETE, "WECHAT_APP_ID": " "})


UNKNOWN_REDIS_OPTIONS = [
    "decode_responses=true",
    "%64ecode_responses=true",
    "DECODE_RESPONSES=true",
    "protocol=2",
    "encoding=latin-1",
    "retry_on_timeout=true",
    "max_connections=1",
    "unknown=1",
    "db=0&unknown=1",
    "socket_timeout=0",
    "socket_timeout=soon",
    "socket_timeout=-1",
    "ssl_ca_certs=/ca.pem",  # without TLS
    "db",
]
UNKNOWN_MYSQL_OPTIONS = [
    "autocommit=true",
    "sql_mode=",
    "init_command=SET%20x=1",
    "read_timeout=0",
    "use_unicode=0",
    "collation=utf8_general_ci",
    "local_infile=1",
    "ssl=true",
    "ssl_check_hostname=perhaps",
    "charset=utf8&unknown=1",
    "compress",
]
MALFORMED = {
    "HOST": ["localhost", "[::1]", "127.0.0.1:8000", "1.2.3"],
    "PORT": ["eighty", "70000"],
    "SESSION_LIFETIME": ["-7", "99999999999999", "86401"],
    "REDIS_URL": [
        "redis://host:65536",
        "redis://host:70000",
        "localhost:6379",
        "redis://:s3cret/w0rd@host:6379/0",
        "redis://:12#s3cret@host/0",
        "redis://:12?s3cret@host/0",
        "redis://[::1/0",
        "redis:///0",
        "redis://host/zero",
        "redis://host/0/1",
        "redis://host?db=zero",
        "redis://one:6379,two:6379/0",
        *(f"redis://host/0?{option}" for option in UNKNOWN_REDIS_OPTIONS),
        "rediss://host?ssl_cert_reqs=perhaps",
        "unix://nowhere",
        "unix:///redis.sock?decode_responses=true",
        "redis+cluster://one:6379,two:6379",
        "redis+sentinel://one:26379,two:26379",  # of which service
        "redis+sentinel://one:26379,two:26379/0/kuaishang",
        "redis+sentinel://one,two/kuaishang",  # at which ports
        "redis+sentinel://one:26379,/kuaishang",
        "redis+sentinel://one:26379;two:26379/kuaishang",
        "redis+sentinel://one:70000/kuaishang",
        "redis+sentinel://:s3cret@/kuaishang/0",
        "redis+sentinel://:s3cret/w0rd@one:26379/kuaishang",
        "redis+sentinel://one:26379/kuaishang?replicas=many",
        "redis+sentinel://one:26379/kuaishang?sentinel_socket_timeout=1",
        "redis://host?replicas=1",
        "rediss+sentinel://one:26379/kuaishang",
    ],
    "DATABASE_URL": [
        "mysql://host:65536/kuaishang",
        "postgresql://localhost/x",
        "mysql://user:s3cret@host:notaport/x",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///x.db?mode=ro",
        "mysql://user:s3cret@host",
        "mysql://user:s3cret@host/",
        *(f"mysql://user:s3cret@host/x?{option}" for option in UNKNOWN_MYSQL_OPTIONS),
    ],
    "WECHAT_API_BASE_URL": ["api.weixin.qq.com", "https://api.weixin.qq.com?", "https://api.weixin.qq.com/#x"],
    "WECHAT_OPEN_BASE_URL": ["javascript:x", "https://", "https:///path", "https://a b", "https://host:70000"],
    "PUBLIC_URL": ["shop.example.com", "https://shop.example.com/?from=x", "https://shop.example.com#x"],
    "SESSION_RATE": ["600", "0/minute", "600/fortnight", "600/minutes", "-1/minute", "1.5/second", "/minute", "never"],
    "LOGIN_RATE": ["600/minute;5/second", "600 a minute", "x" * 9],
    "APP_LOGIN_RATE": ["9999999999/minute"],
    "TRUSTED_PROXIES": ["proxy.local", "10.0.0.1/8", "10.0.0.0/33", "127.0.0.1,", "127.0.0.1 ::1", "*", "unix"],
    "CORS_ORIGINS": [
        "*",
        "null",
        "h5.example.com",
        "https://h5.example.com/",
        "https://h5.example.com/path",
        "https://H5.example.com",
        "https://h5.example.com:443",
        "http://h5.example.com:80",
        "https://user@h5.example.com",
        "https://*.example.com",
        "https://a.example.com,",
        "https://a.example.com https://b.example.com",
        "https://a.example.com;https://b.example.com",
        "ftp://h5.example.com",
        "https://h5.example.com\nx",
    ],
    "SECRET_KEY": ["too-short", "k" * 32, "changeme" * 4],
    "ENCRYPTION_KEYS": [
        "%%%-not-base64",
        "密钥",
        base64.b64encode(bytes(16)).decode(),
        " ".join([base64.b64encode(bytes(32)).decode()] * 2),
        ",".join([base64.b64encode(bytes(32)).decode()] * 2),
    ],
    "ADMIN_OPENIDS": ["o-one o-two", "o-one,,o-two", "o-one;o-two", "o-one,o-one"],
    "SECRET_KEY_FALLBACKS": ["too-short", f"{'k' * 31}1,too-short", f"{'k' * 32},", f"{'k' * 32},,{'l' * 32}"],
    "METRICS_TOKEN": ["x" * 15, f"{'x' * 16},", f"{'x' * 16},{'y' * 15}", "x" * 8 + " " + "x" * 8, "令" * 16],
    "DRAIN_SECONDS": ["-1", "13"],
    "LOG_LEVEL": ["LOUD"],
    "WECHAT_PUSH_TOKEN": ["has space", "x" * 33, "tok\nen"],
    "WECHAT_PUSH_AES_KEY": ["x" * 42, "x" * 44, "x" * 42 + "=", "x" * 42 + "é", "x" * 20 + "\n" + "x" * 22],
    "WECHAT_CONTENT_CHECK": ["perhaps"],
    "DOCS": ["perhaps"],
    "TRUST_WXCLOUD_HEADERS": ["perhaps"],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_setting_is_named_without_its_value(name: str) -> None:
    for value in MALFORMED[name]:
        with pytest.raises(SettingsError) as caught:
            load({**COMPLETE, name: value})
        assert f"{name}: " in str(caught.value), value
        assert f"{value} " not in str(caught.value)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("WECHAT_PUSH_AES_KEY", "WECHAT_PUSH_TOKEN"),
        ("WECHAT_ACCOUNT_APP_ID", "WECHAT_ACCOUNT_APP_SECRET"),
        ("WECHAT_ACCOUNT_APP_SECRET", "WECHAT_ACCOUNT_APP_ID"),
        ("WECHAT_WEBSITE_APP_ID", "WECHAT_WEBSITE_APP_SECRET"),
        ("WECHAT_WEBSITE_APP_SECRET", "WECHAT_WEBSITE_APP_ID"),
    ],
)
def test_a_setting_that_requires_another_names_it(name: str, missing: str) -> None:
    with pytest.raises(SettingsError, match=f"{missing}: Required because {name} is set."):
        load({**COMPLETE, name: "x" * 43})


def test_a_token_alone_means_plain_messages() -> None:
    loaded = load({**COMPLETE, "WECHAT_PUSH_TOKEN": "AAAAA"})
    assert (loaded["WECHAT_PUSH_TOKEN"], loaded["WECHAT_PUSH_AES_KEY"]) == ("AAAAA", "")


def test_encryption_keys_keep_their_order() -> None:
    keys = [bytes([number]) * 32 for number in range(3)]
    listed = ", ".join(base64.b64encode(key).decode() for key in keys)
    assert load({**COMPLETE, "ENCRYPTION_KEYS": listed})["ENCRYPTION_KEYS"] == keys


def test_a_list_is_read_in_its_order_without_the_blanks() -> None:
    listed = {"ADMIN_OPENIDS": "o-two ,o-one", "CORS_ORIGINS": "https://b.example.com , https://a.example.com"}
    loaded = load({**COMPLETE, **listed, "TRUSTED_PROXIES": "::1, 10.0.0.0/8"})
    assert loaded["ADMIN_OPENIDS"] == ["o-two", "o-one"]
    assert loaded["CORS_ORIGINS"] == ["https://b.example.com", "https://a.example.com"]
    assert loaded["TRUSTED_PROXIES"] == [ip_network("::1"), ip_network("10.0.0.0/8")]
    assert [load(COMPLETE)[name] for name in (*listed, "TRUSTED_PROXIES")] == [[], [], []]


def test_several_values_may_be_accepted_during_a_rotation() -> None:
    many = {"SECRET_KEY_FALLBACKS": [f"{letter * 31}=" for letter in "ab"], "METRICS_TOKEN": ["-" * 16, "=+~!" * 4]}
    for name, values in many.items():
        assert load({**COMPLETE, name: " , ".join(values)})[name] == values
        assert load({**COMPLETE, name: values[0]})[name] == values[:1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "redis://host"),
        ("REDIS_URL", "redis://host:65535"),
        ("REDIS_URL", "redis://user:pass%23word@[::1]:6379/15"),
        ("REDIS_URL", "redis://host/0?socket_timeout=10&socket_connect_timeout=.5"),
        ("REDIS_URL", "rediss://:password@host:6380?ssl_ca_certs=/ca.pem&ssl_check_hostname=false&ssl_cert_reqs=none"),
        ("REDIS_URL", "unix:///run/redis.sock?db=1&socket_timeout=10"),
        ("REDIS_URL", "redis+sentinel://one:26379/kuaishang"),
        ("REDIS_URL", "redis+sentinel://user:p%2Fss@one:26379,10.0.0.2:26379,[::1]:26379/my-Master_1/15"),
        (
            "REDIS_URL",
            "redis+sentinel://:x@one:1/a?db=1&replicas=2&sentinel_username=u&sentinel_password=p&socket_timeout=1",
        ),
        ("DATABASE_URL", "mysql://user:p#a/s?s%40@host:3306/kuaishang?charset=utf8"),
        ("DATABASE_URL", "mariadb+pymysql:///kuaishang?unix_socket=/run/mysql.sock"),
        ("DATABASE_URL", "mysql://user@host/kuaishang?ssl_ca=/ca.pem&ssl_check_hostname=true"),
        ("DATABASE_URL", "sqlite:////data/my#shop.db"),
        ("PUBLIC_URL", "https://shop.example.com/path/"),
    ],
)
def test_urls_that_work_are_taken_as_they_are(name: str, value: str) -> None:
    assert load({**COMPLETE, name: value})[name] == value


def test_white_space_around_a_value_is_removed() -> None:
    """As of a secret that was read from a file."""
    assert load({**COMPLETE, "WECHAT_APP_SECRET": " secret\r\n"})["WECHAT_APP_SECRET"] == "secret"


def test_a_session_may_last_as_long_as_its_absolute_lifetime() -> None:
    loaded = load({**COMPLETE, "SESSION_LIFETIME": "90000", "SESSION_ABSOLUTE_LIFETIME": "90000"})
    assert loaded["SESSION_LIFETIME"] == 90000


WriteFile = Callable[..., Path]


@pytest.fixture
def write_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Write the file of ENV_FILE."""
    path = tmp_path / "settings.env"
    for name in Settings().fields:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ENV_FILE", str(path))

    def write(content: str | bytes, mode: int = 0o600) -> Path:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
        return path

    return write


def test_the_file_has_what_the_environment_leaves_unset(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    in_file = {**COMPLETE, "PORT": "8001", "LOG_LEVEL": "ERROR", "SESSION_LIFETIME": "", "DRAIN_SECONDS": "1"}
    write_file("".join(f"{name}={value}\n" for name, value in in_file.items()))
    monkeypatch.setenv("PORT", "8002")
    monkeypatch.setenv("DRAIN_SECONDS", " ")
    before = dict(os.environ)
    loaded = load()
    assert (loaded["PORT"], loaded["LOG_LEVEL"]) == (8002, "ERROR")
    assert (loaded["SESSION_LIFETIME"], loaded["DRAIN_SECONDS"]) == (3600, 1)
    assert {name: loaded[name] for name in ("WECHAT_APP_ID", "REDIS_URL", "SECRET_KEY")}.items() <= COMPLETE.items()
    write_file("".join(f"{name}={value}\n" for name, value in {**in_file, "LOG_LEVEL": "DEBUG"}.items()))
    assert load()["LOG_LEVEL"] == "DEBUG"
    assert load(only=["DATABASE_URL"])["DATABASE_URL"] == "sqlite:///x.db"
    assert dict(os.environ) == before


# What the line gives, or None where a reader of such files could take it for something else.
LINES: dict[str, dict[str, str] | None] = {
    "": {},
    "  # NAME=value": {},
    "NAME=s3cret": {"NAME": "s3cret"},
    "NAME2_b=s3cret": {"NAME2_b": "s3cret"},
    " export NAME = s3cret\t": {"NAME": "s3cret"},
    "NAME=": {},
    "NAME=''": {},
    "NAME=a=b": {"NAME": "a=b"},
    "NAME=a, b": {"NAME": "a, b"},
    "NAME=a#b": {"NAME": "a#b"},
    "NAME=#b": {"NAME": "#b"},
    "NAME=密钥": {"NAME": "密钥"},
    "NAME='s3cret'": {"NAME": "s3cret"},
    """NAME=' # "${HOME}" \\n '""": {"NAME": """ # "${HOME}" \\n """},
    """NAME="it's # s3cret" """: {"NAME": "it's # s3cret"},
    "NAME=s3cret # a comment": None,
    "NAME=s3cret\t#": None,
    "NAME= # a comment": None,
    "NAME='s3cret' # a comment": None,
    "NAME=${HOME}": None,
    "NAME=s3cret$1": None,
    'NAME="${HOME}"': None,
    r'NAME="s3\ncret"': None,
    r"NAME=s3\ncret": None,
    "NAME='s3cret": None,
    'NAME="s3cret': None,
    "NAME=s3cret'": None,
    "NAME='s3'cret'": None,
    "NAME='s3' 'cret'": None,
    "NAME s3cret": None,
    "NAME": None,
    "=s3cret": None,
    "2NAME=s3cret": None,
    "NA-ME=s3cret": None,
    "\ufeffNAME=s3cret": None,
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_file_is_literal_or_named_without_its_value(write_file: WriteFile, line: str) -> None:
    path = write_file(f"BEFORE=1\r\n\n{line}\nAFTER=2\n")
    expected = LINES[line]
    if expected is None:
        with pytest.raises(SettingsError) as caught:
            load()
        assert str(caught.value) == f"{path}, line 3: not NAME=value, or needs quotes: NAME='value'"
    else:
        read = {name: value for name, value in settings.variables().items() if name not in os.environ}
        assert read == {"BEFORE": "1", **expected, "AFTER": "2"}


@pytest.mark.parametrize("line", LINES)
def test_the_supervisor_reads_a_line_in_the_same_way(write_file: WriteFile, line: str) -> None:
    """It reads PORT and METRICS_TOKEN; a line that settings.py refuses gives it nothing."""
    path = write_file(f"BEFORE=1\r\n\n{line}\nAFTER=2\n")
    assert read_env(path) == {"BEFORE": "1", **(LINES[line] or {}), "AFTER": "2"}


def test_no_other_reader_puts_a_file_into_the_environment() -> None:
    """With python-dotenv, `flask` would put a .env of its own choice there, which wins over ENV_FILE."""
    assert "python-dotenv" not in (ROOT / "requirements.txt").read_text()


def test_a_file_that_cannot_be_read_is_named(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(b"SECRET_KEY=\xff")
    with pytest.raises(SettingsError, match=f"{path} cannot be read: it is not UTF-8"):
        load()
    path.unlink()
    with pytest.raises(SettingsError, match=f"{path} cannot be read: No such file or directory"):
        load()
    monkeypatch.setenv("ENV_FILE", str(path.parent))
    with pytest.raises(SettingsError, match=f"{path.parent} cannot be read: Is a directory"):
        load()


def test_a_file_that_others_can_open_is_refused(write_file: WriteFile) -> None:
    for mode, by_root, by_another in (
        (0o600, True, True),
        (0o400, True, True),
        (0o640, True, False),  # the group's, as which the service may run
        (0o660, False, False),
        (0o644, False, False),
        (0o604, False, False),
        (0o602, False, False),
    ):
        path = write_file("PORT=8001\n", mode)
        for owner, is_fine in ((0, by_root), (1000, by_another)):
            if os.geteuid() == 0:
                os.chown(path, owner, -1)
            elif owner != 1000:
                continue
            if is_fine:
                assert settings.variables()["PORT"] == "8001"
            else:
                with pytest.raises(SettingsError, match="others can open it: chmod 600"):
                    settings.variables()


def test_the_file_is_by_default_beside_the_code_and_may_be_missing(
    write_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENV_FILE", "")
    monkeypatch.chdir("/")
    shutil.copy(ROOT / "settings.py", tmp_path)

    def port() -> str | None:
        return runpy.run_path(str(tmp_path / "settings.py"))["variables"]().get("PORT")

    assert port() is None
    write_file("PORT=8001\n").rename(tmp_path / ".env")
    assert port() == "8001"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the service, without what does not run."""
    for name in ("requirements.txt", "openapi.json", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("blueprints", "storage", "telemetry", "wechat"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def named(tree: Path) -> dict[str, Any]:
    loaded = runpy.run_path(str(tree / "settings.py"))["load"](COMPLETE)
    return {name: loaded[name] for name in ("RELEASE", "VERSION")}


def test_a_release_is_what_its_file_says(tree: Path) -> None:
    made = {"version": "0.1.1", "commit": "0123456789ab", "built": "2026-11-27T04:00:00Z"}
    (tree / "release.json").write_text(json.dumps(made))
    release = named(tree)["RELEASE"]
    assert named(tree)["VERSION"] == "0.1.1+0123456789ab"
    assert made.items() <= release.items()
    assert release["started"] > release["built"]


def test_without_that_file_the_code_names_the_version(tree: Path) -> None:
    before = named(tree)
    assert re.fullmatch("[0-9a-f]{12}", before["RELEASE"]["commit"])
    (tree / ".#settings.py").symlink_to("somebody@somewhere.1:2")  # how Emacs marks what it edits
    for part in ("tests", "dev", "__pycache__", "telemetry/__pycache__"):
        (tree / part).mkdir(exist_ok=True)
        (tree / part / "other.py").write_text("pass")
    (tree / "README.md").write_text("other")
    assert named(tree)["VERSION"] == before["VERSION"]
    seen = {before["VERSION"]}
    for name in ("wsgi.py", "blueprints/web_login.html", "storage/models.py", "storage/migrations/env.py"):
        (tree / name).write_text(f"{(tree / name).read_text()}\n")
        assert named(tree)["VERSION"] not in seen
        seen.add(named(tree)["VERSION"])
    for name in ("requirements.txt", "openapi.json", "wechat/crypto.py", "telemetry/logs.py", "gunicorn.conf.py"):
        (tree / name).unlink()
        assert named(tree)["VERSION"] not in seen
        seen.add(named(tree)["VERSION"])
