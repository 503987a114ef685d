"""What of deploy/galera and deploy/tidb needs no five nodes, and the checker of histories.

tests/deploy/galera.py has the rest.

`.ci/run` installs Debian's mariadb-server, mariadb-backup, galera-4, socat and haproxy.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pymysql
import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.databases import executable
from tests.deploy.galera_nodes import PASSWORD, USER, Galera, Writer, is_installed
from tests.deploy.history import SOUND, Verdict, history
from tests.deploy.load_balancers import HAPROXY
from tests.deploy.systemd import needs_systemd, verify
from tests.faults.stage import Stage
from tests.harness import ROOT, WAIT_SECONDS, wait_until

FOLDER = ROOT / "deploy" / "galera"
UNIT = Path("/usr/lib/systemd/system/mariadb.service")
CHECK = re.compile(r'^ +tcp-check send(-binary)? "?([^"\n]+)', re.MULTILINE)
needs_galera = pytest.mark.skipif(not (is_installed() and HAPROXY), reason="needs mariadb, galera-4 and haproxy")

PROMISES = {
    "innodb_flush_log_at_trx_commit": "1",  # what was acknowledged is on the disk of every node that had it
    "wsrep_sync_wait": "1",  # a read finds what was acknowledged before it, also while the writer moves
    "wsrep_on": "ON",
    "binlog_format": "ROW",  # else a statement may have another outcome on another node
    "innodb_autoinc_lock_mode": "2",
    "innodb_force_primary_key": "ON",  # rows without a key cannot be certified
    "enforce_storage_engine": "InnoDB",  # others are not replicated
    "max_connections": "520",  # README.md says for how many instances
    "max_user_connections": "500",  # the rest is for HAProxy's check, which else moves the writer
}
"""Settings without which a commit that was acknowledged may be lost, read stale or differ from node to node, or the
service may lose its writer because it is busy."""


def has_mariadb() -> bool:
    try:
        return bool(executable("mariadbd"))
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_mariadb(), reason="mariadb-server is not installed")
def test_mariadb_knows_each_setting() -> None:
    command = [executable("mariadbd"), f"--defaults-file={FOLDER}/galera.cnf", "--user=mysql", "--verbose", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = re.findall(r"^(\w+) = (.+)$", (FOLDER / "galera.cnf").read_text(), re.MULTILINE)
    table = told.partition("Variables (--variable-name=value)")[2]
    values = dict(re.findall(r"^([a-z-]+) +(\S.*)$", table, re.MULTILINE))
    on = {"ON": "TRUE"}
    assert len(wanted) > 10
    assert dict(wanted).items() >= PROMISES.items()
    seconds = dict(re.findall(r"\b([\w.]+)=PT([\d.]+)S", dict(wanted)["wsrep_provider_options"]))
    # A node that hangs is passed over before the others suspect each other.
    assert float(seconds["gmcast.peer_timeout"]) < float(seconds["evs.suspect_timeout"])
    assert {name: values[name.replace("_", "-")] for name, _ in wanted} == {
        name: on.get(value, value).strip('"') for name, value in wanted
    }


@needs_systemd
@pytest.mark.skipif(not UNIT.exists(), reason="mariadb-server is not installed")
def test_systemd_accepts_what_is_added_to_debians_unit(tmp_path: Path) -> None:
    """A member that waits for the others is neither ended nor left."""
    unit, added = shutil.copy(UNIT, tmp_path), tmp_path / f"{UNIT.name}.d" / "60-galera.conf"
    added.parent.mkdir()
    shutil.copy(FOLDER / "restart.conf", added)
    verify(unit, ours=str(tmp_path))
    assert {"TimeoutStartSec=infinity", "Restart=on-failure"} <= set(added.read_text().splitlines())


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
def test_haproxy_takes_the_configuration_beside_the_other_one(tmp_path: Path) -> None:
    ours = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    ours = re.sub(r" ssl crt .*", "", ours).replace("/var/lib/haproxy/state", f"{tmp_path}/state")
    (tmp_path / "state").write_text("1\n")
    head = tmp_path / "haproxy.cfg"
    for text in ("global\n    log stdout format raw daemon\n", ours):
        head.write_text(text)
        command = [str(HAPROXY), "-c", "-dW", "-L", "site-1", "-f", str(head), "-f", str(FOLDER / "haproxy.cfg")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    binds = re.findall(r"(?m)^ +bind \S*:(\d+)", ours + (FOLDER / "haproxy.cfg").read_text())
    assert sorted(binds) == ["3306", "443", "80", "8404", "8405"]


def test_the_packets_of_the_check_have_the_length_that_they_name() -> None:
    sent = CHECK.findall((FOLDER / "haproxy.cfg").read_text())
    packets = b"".join(bytes.fromhex(text) if binary else text.encode() for binary, text in sent)
    found = []
    while packets:
        length, number = int.from_bytes(packets[:3], "little"), packets[3]
        found.append((number, packets[4 : 4 + length]))
        assert len(found[-1][1]) == length
        packets = packets[4 + length :]
    (login, as_user), (query, statement), (leave, end) = found
    assert (login, query, leave) == (1, 0, 0)
    assert as_user.endswith(b"haproxy\0\0")
    assert statement.startswith(b"\x03SET STATEMENT wsrep_sync_wait=0 FOR SELECT ")
    assert end == b"\x01"


def states_for_prometheus(writer: Writer) -> dict[str, float]:
    """Return what the alarm DatabaseNodeOut reads of the node n1, by state."""
    scraped = requests.get(f"{writer.statistics_url}/metrics", timeout=WAIT_SECONDS).text
    samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
    of_node = {"proxy": "database", "server": "n1"}
    return {
        sample.labels["state"]: sample.value
        for sample in samples
        if sample.name == "haproxy_server_status" and sample.labels.items() >= of_node.items()
    }


@needs_galera
def test_haproxy_asks_a_node_whether_it_takes_writes(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kuaishang-galera-") as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)
        galera = stack.enter_context(closing(Galera(Path(folder), size=1)))
        galera.start()
        galera.create()
        writer = stack.enter_context(closing(Writer(tmp_path / "writer", galera)))
        (node,) = galera.nodes
        wait_until(lambda: writer.states() == {"n1": "UP"})
        assert states_for_prometheus(writer) == {"DOWN": 0, "UP": 1, "MAINT": 0, "DRAIN": 0, "NOLB": 0}
        node.execute("SET GLOBAL read_only = 1")
        wait_until(lambda: writer.states() == {"n1": "DOWN"})
        assert states_for_prometheus(writer) == {"DOWN": 1, "UP": 0, "MAINT": 0, "DRAIN": 0, "NOLB": 0}
        writer.ask("set server database/n1 state maint")  # as for an index
        assert states_for_prometheus(writer) == {"DOWN": 0, "UP": 0, "MAINT": 1, "DRAIN": 0, "NOLB": 0}
        writer.ask("set server database/n1 state ready")
        node.execute("SET GLOBAL read_only = 0")
        wait_until(lambda: writer.states() == {"n1": "UP"})
        assert requests.get(f"{writer.statistics_url}/", timeout=WAIT_SECONDS).status_code == 404
        assert "user: 'haproxy'" not in node.log.read_text()  # as if the check did not end its connection
        # The service cannot take the last connections of a node.
        node.execute("SET GLOBAL max_connections = 30")
        node.execute("SET GLOBAL max_user_connections = 10")
        at = {"host": node.address, "port": node.port}
        login = {**at, "user": USER, "password": PASSWORD}
        opened = (stack.enter_context(closing(pymysql.connect(**login))) for _ in range(30))
        with pytest.raises(pymysql.err.OperationalError, match="max_user_connections"):
            list(opened)
        pymysql.connect(**at, user="haproxy").close()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack, mariadb=True)


def judge(stage: Stage, **clients: int) -> Verdict:
    with history(stage, **clients) as running:
        wait_until(lambda: len(running.outcomes) > 100)
    return running.verdict()


@pytest.mark.skipif(not has_mariadb(), reason="mariadb-server is not installed")
def test_the_checker_finds_nothing_where_nothing_is_wrong_though_commits_are_lost(stage: Stage) -> None:
    stage.serve("tests.apps.lost_commits")
    assert judge(stage, order=2, once=2, item=2) == SOUND


@pytest.mark.skipif(not has_mariadb(), reason="mariadb-server is not installed")
def test_the_checker_sees_that_lost_commits_are_repeated_blindly(stage: Stage) -> None:
    stage.serve("tests.apps.lost_commits", BLIND="1")
    seen = judge(stage, order=1, once=4)
    assert seen.doubled > 0
    assert seen.lost == 0


@pytest.mark.skipif(not has_mariadb(), reason="mariadb-server is not installed")
def test_the_checker_sees_what_is_lost_doubled_and_stale(stage: Stage) -> None:
    stage.serve("tests.apps.forgetful")
    seen = judge(stage, order=2, once=2)
    assert seen.lost > 0
    assert seen.doubled > 0
    assert seen.stale > 0


def test_tidb_has_five_replicas_in_three_centres() -> None:
    folder = ROOT / "deploy" / "tidb"
    topology = yaml.safe_load((folder / "topology.yaml").read_text())
    labels = [store["config"]["server.labels"] for store in topology["tikv_servers"]]
    regions = [label["region"] for label in labels]
    assert sorted(regions.count(region) for region in set(regions)) == [1, 2, 2]
    assert len({label["host"] for label in labels}) == len(topology["pd_servers"]) == 5
    options = topology["server_configs"]["pd"]
    assert options["replication.max-replicas"] == 5
    assert {tuple(label) for label in labels} == {tuple(options["replication.location-labels"])}
    policy = (folder / "placement.sql").read_text().partition("CREATE PLACEMENT POLICY")[2]
    assert set(re.search(r"REGIONS = '([^']+)'", policy)[1].split(",")) == set(regions)  # type: ignore[index]
    assert "FOLLOWERS = 4" in policy
