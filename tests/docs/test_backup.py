"""The backup of docs/*/going-live.md restores a user, with the phone number that only ENCRYPTION_KEYS can read."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.databases import MariaDB, executable
from tests.docs.pages import blocks, page
from tests.harness import PERSON, Service, Simulator, migrate


def run(script: str, folder: Path, database: MariaDB) -> None:
    executable("mariadb-dump")
    (folder / ".my.cnf").write_text(f"[client]\nsocket={database.socket}\nuser=root\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, check=True)


@pytest.mark.only_on("mariadb")
def test_a_backup_restores_the_users(
    own_databases: MariaDB, start_service: Callable[..., Service], simulator: Simulator, tmp_path: Path
) -> None:
    dump, restore = [block.text for block in blocks(page("zh", "going-live.md"))]
    own_databases.execute("CREATE DATABASE kuaishang CHARACTER SET utf8mb4")
    url = f"mysql://root@localhost/kuaishang?unix_socket={own_databases.socket}"
    migrate(url)
    service = start_service(DATABASE_URL=url)
    token = service.log_in(simulator, openid="o-backup")
    stored = service.call("PUT", "/users/me/phone", token, json={"code": simulator.phone_code(phone=PERSON["phone"])})
    assert stored.status_code == 200, stored.text
    before = service.read_me(token).json()["data"]
    run(dump, tmp_path, own_databases)
    (written,) = tmp_path.glob("kuaishang-*.sql.gz")
    service.discard()
    own_databases.execute("DROP DATABASE kuaishang")
    own_databases.execute("CREATE DATABASE kuaishang CHARACTER SET utf8mb4")
    run(restore.replace("kuaishang-2026-11-27.sql.gz", written.name), tmp_path, own_databases)
    migrate(url)  # nothing to do
    service = start_service(DATABASE_URL=url)
    assert service.read_me(token).json()["data"] == before
