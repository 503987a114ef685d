import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from dev import redis_server
from dev.redis_server import RedisServer


def test_data_survives_a_restart(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    for expected in (None, b"kept"):
        server.start()
        with Redis.from_url(server.url) as client:
            assert client.get("key") == expected
            client.set("key", "kept")
        server.stop()
    server.close()
    assert not Path(server.socket).parent.exists()


def test_only_this_user_can_open_the_socket(redis_server: RedisServer) -> None:
    assert stat.S_IMODE(Path(redis_server.socket).parent.stat().st_mode) == 0o700


def test_it_starts_with_a_long_data_path(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / ("deep" * 20) / ("deeper" * 20))
    server.start()
    server.close()


def test_the_wheel_has_one_if_the_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    carried = Path(redis_server.executable())
    assert carried.name == ("redis-server" if sys.version_info < (3, 13) else "valkey-server")
    assert subprocess.check_output([carried, "--version"], text=True).startswith(("Redis server", "Valkey server"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert redis_server.executable() == "/opt/redis-server"
