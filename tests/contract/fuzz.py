"""Calls the live service as openapi.json describes it, and as it does not: `make fuzz` (MINUTES=30, SEED=7).

Schemathesis makes the requests, as nobody, as a user and as an administrator, and checks the responses; fuzz_hooks.py
gives it what it cannot guess. The service is gunicorn with two workers, beside Redis and the WeChat simulator, on
SQLite and on MariaDB. The status is not 0 if a check fails, or if an operation never did what it is for, as nothing is
proven about it then.
"""

import argparse
import base64
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from dev.redis_server import RedisServer
from tests.databases import MariaDB, SQLiteFiles, executable
from tests.harness import (
    APP_ID,
    APP_SECRET,
    METRICS_TOKEN,
    PUSH_TOKEN,
    ROOT,
    WEB_APP_ID,
    WEB_APP_SECRET,
    Service,
    Simulator,
    bound_to_this_process,
    migrate,
)

CONFIGURATION = ROOT / "tests/contract/schemathesis.toml"
CALLERS = {"nobody": 1, "user": 2, "administrator": 2}
"""And their shares of the time."""
ADMINISTRATORS = ["fuzz-administrator", "fuzz-spare-administrator"]
NOT_FOR_USERS = {"administration", "metrics"}
"""The tags of what answers 401 or 403 to a user who is no administrator."""


@contextmanager
def stage(database: str) -> Iterator[tuple[Service, Simulator]]:
    """Start the service and all that it needs, on an empty database.

    :param database: sqlite or mariadb.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(closing(RedisServer(folder / "redis", bound_to_this_process())))
        redis.start()
        simulator = Simulator(folder / "simulator")
        stack.callback(simulator.process.kill)
        databases = {"sqlite": SQLiteFiles, "mariadb": MariaDB}[database](folder / "databases")
        stack.enter_context(closing(databases))
        databases.start()
        database_url = databases.create()
        migrate(database_url)
        environ = {
            "WECHAT_APP_ID": APP_ID,
            "WECHAT_APP_SECRET": APP_SECRET,
            "WECHAT_API_BASE_URL": simulator.url,
            "WECHAT_OPEN_BASE_URL": simulator.url,
            "WECHAT_ACCOUNT_APP_ID": WEB_APP_ID,
            "WECHAT_ACCOUNT_APP_SECRET": WEB_APP_SECRET,
            "WECHAT_PUSH_TOKEN": PUSH_TOKEN,
            # A busy machine may take longer than the service allows Redis.
            "REDIS_URL": f"{redis.url}?socket_timeout=10&socket_connect_timeout=10",
            "DATABASE_URL": database_url,
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": base64.b64encode(secrets.token_bytes(32)).decode(),
            "ADMIN_OPENIDS": ",".join(ADMINISTRATORS),
            "METRICS_TOKEN": METRICS_TOKEN,
            "SESSION_LIFETIME": "86400",
            "DRAIN_SECONDS": "0",
            **dict.fromkeys(("LOGIN_RATE", "APP_LOGIN_RATE", "SESSION_RATE"), "off"),  # all callers are one client
        }
        service = Service(environ, folder / "service")
        stack.callback(service.discard)
        try:
            yield service, simulator
        finally:
            for line in service.log_lines():
                if line["level"] == "ERROR":
                    print(json.dumps(line, ensure_ascii=False))


def log_in_all(service: Service, simulator: Simulator, path: Path) -> None:
    """Write the credentials of each caller as Schemathesis reads them: Web Fuzzing Commons' format."""
    openids = {"user": "fuzz-user", "peer": "fuzz-peer", "administrator": ADMINISTRATORS[0]}
    entries: list[dict[str, Any]] = [
        {"name": "nobody", "fixedHeaders": [{"name": "Accept", "value": "*/*"}]}  # it wants one
    ]
    for name, openid in openids.items():
        header = {"name": "Authorization", "value": f"Bearer {service.log_in(simulator, openid=openid)}"}
        entries.append({"name": name, "fixedHeaders": [header]})
    path.write_text(json.dumps({"auth": entries}))


def fuzz(caller: str, service: Service, simulator: Simulator, seconds: int, words: list[str]) -> bool:
    """Run Schemathesis once, and print its findings and figures; returns whether all is well."""
    with tempfile.TemporaryDirectory() as folder:
        logins, figures = Path(folder) / "logins.json", Path(folder) / "figures.json"
        log_in_all(service, simulator, logins)
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            str(CONFIGURATION),
        ]
        command += ["run", str(ROOT / "openapi.json"), "--url", service.url, "--max-time", str(seconds), *words]
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FUZZ_CALLER": caller,
            "FUZZ_LOGINS": str(logins),
            "FUZZ_SERVICE": service.url,
            "FUZZ_SIMULATOR": simulator.url,
            "FUZZ_FIGURES": str(figures),
        }
        status = subprocess.run([*bound_to_this_process(), *command], cwd=folder, env=environ).returncode
        answers: Counter[tuple[str, int]] = Counter()
        for operation, code, count in json.loads(figures.read_text() if figures.exists() else "[]"):
            answers[operation, code] += count
    idle = unproven(caller, answers) if "--include" not in " ".join(words) else []
    for operation in sorted({operation for operation, _ in answers}):
        row = " ".join(f"{code}×{count}" for (name, code), count in sorted(answers.items()) if name == operation)
        print(f"  {operation:60} {row}")
    print(f"{caller}: {answers.total()} examples; {'failed' if status else 'all passed'}", flush=True)
    for operation in idle:
        print(f"{caller}: not once what it is for: {operation}")
    return not status and not idle


def unproven(caller: str, answers: Counter[tuple[str, int]]) -> list[str]:
    """The operations that never answered this caller what they must: with success, or with 401 or 403."""
    found = []
    for path, item in json.loads((ROOT / "openapi.json").read_text())["paths"].items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            label = f"{method.upper()} {path}"
            refused = caller == "nobody" and operation["security"]
            refused = refused or (caller == "user" and NOT_FOR_USERS & set(operation["tags"]))
            wanted = (401, 403) if refused else range(200, 400)
            if not any(answers[label, code] for code in wanted):
                found.append(label)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4, help="for each database; default: 4")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="default: a random one")
    parser.add_argument("--database", choices=["sqlite", "mariadb"], action="append", help="default: both")
    parser.add_argument("--caller", choices=list(CALLERS), action="append", help="default: all")
    options, words = parser.parse_known_args()  # the others are Schemathesis': --include-path-regex ^/api/v1/orders
    databases, callers = options.database or ["sqlite", "mariadb"], options.caller or list(CALLERS)
    if not options.database and not installed("mariadbd"):
        print("Not run: MariaDB, as mariadbd is not installed.")
        databases.remove("mariadb")
    print(f"seed {options.seed}", flush=True)
    well = True
    for database in databases:
        print(f"== {database}", flush=True)
        with stage(database) as (service, simulator):
            for caller in callers:
                share = CALLERS[caller] / sum(CALLERS[name] for name in callers)
                seconds = max(1, round(options.minutes * 60 * share))
                well &= fuzz(caller, service, simulator, seconds, [*words, "--seed", str(options.seed)])
    sys.exit(not well)


def installed(name: str) -> bool:
    try:
        return bool(executable(name))
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main()
