"""Five Galera nodes in three sites under load: nodes and sites are killed and cut off, and nothing is lost or doubled.

Run by hand, as it takes about five minutes:

    .venv/bin/python -m pytest -s tests/deploy/galera.py

The tests share one cluster, and run in this order; each leaves it whole.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import pytest

from tests.deploy.galera_nodes import DATABASE, Galera, Node, Writer, documented, is_installed
from tests.deploy.history import SOUND, History, history
from tests.deploy.partition import can_cut, cut, heal
from tests.deploy.patch.test_check import Tree
from tests.faults.load import codes, complaint, is_right
from tests.faults.stage import Stage
from tests.harness import WAIT_SECONDS, wait_until

pytestmark = pytest.mark.skipif(not is_installed(), reason="needs mariadb-server, galera-4, mariadb-backup and socat")

WRITABLE_SECONDS = 5
"""In which the service writes again after one or two nodes, or a site, are gone."""
SILENT_SECONDS = 6
"""In which it does after some went silent: what was sent to them gets no answer, and waits for 3 seconds."""


@pytest.fixture(scope="module")
def galera() -> Iterator[Galera]:
    # Every user may pass, as the servers do not run as root.
    with tempfile.TemporaryDirectory(prefix="kuaishang-galera-") as folder:
        Path(folder).chmod(0o755)
        with closing(Galera(Path(folder))) as cluster:
            cluster.start()
            cluster.create()
            yield cluster


@pytest.fixture(scope="module")
def writer(galera: Galera, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    with closing(Writer(tmp_path_factory.mktemp("writer"), galera)) as writer:
        yield writer


@pytest.fixture(scope="module")
def stage(writer: Writer) -> Iterator[Stage]:
    """The service, which reaches the cluster through HAProxy."""
    with ExitStack() as stack:
        stage = Stage(stack, mariadb=False, database_url=writer.url)
        stage.serve()
        yield stage


def the_writer(galera: Galera, writer: Writer) -> Node:
    return next(node for node in galera.nodes if node.name == writer.writer())


def report(what: str, running: History, began: float, seconds: float | None) -> float:
    """Print the figures of a fault, for `pytest -s`.

    :returns: the seconds until an order that was sent since then was acknowledged.
    """
    sent = running.since(began)
    failed = [outcome for outcome in sent if not is_right(outcome)]
    first = min(one.began + one.seconds - began for one in sent if is_right(one) and one.request.kind == "order")
    print(
        f"\n{what}: {len(sent)} requests, {len(failed)} failed {codes(failed)}, first write after {first:.1f} s,",
        end="",
    )
    print(f"  the last failure after {seconds} s, {running.verdict()}")
    return first


def is_sound(galera: Galera, running: History) -> bool:
    """Whether each node that is a member has all that was acknowledged, once."""
    nodes = [node for node in galera.nodes if node.is_synced()]
    assert nodes
    return {running.verdict(galera.url(node.address, node.port)) for node in nodes} == {SOUND}


def test_one_node_is_killed(galera: Galera, writer: Writer, stage: Stage) -> None:
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        gone = the_writer(galera, writer)
        began = time.monotonic()
        galera.kill([gone])
        seconds = running.recovered(began)
        first = report(f"{gone.name} killed", running, began, seconds)
        assert seconds is not None
        assert max(first, seconds) < WRITABLE_SECONDS
        now = the_writer(galera, writer)
        galera.join([gone])
        wait_until(lambda: writer.states()[gone.name] == "UP")
        assert the_writer(galera, writer) == now  # a return moves nothing
        assert is_sound(galera, running)
        assert {text for text in map(complaint, running.since(began)) if text} == set()
    assert is_sound(galera, running)


def test_two_nodes_are_killed_at_once(galera: Galera, writer: Writer, stage: Stage) -> None:
    with history(stage) as running:
        gone = [the_writer(galera, writer), galera.nodes[4]]
        assert running.recovered(time.monotonic()) is not None
        began = time.monotonic()
        galera.kill(gone)
        seconds = running.recovered(began)
        first = report(f"{gone[0].name} and {gone[1].name} killed", running, began, seconds)
        assert seconds is not None
        assert max(first, seconds) < WRITABLE_SECONDS
        galera.join(gone)
        assert is_sound(galera, running)
        assert {text for text in map(complaint, running.since(began)) if text} == set()
    assert is_sound(galera, running)


def test_a_node_without_data_is_given_all_of_it(galera: Galera, writer: Writer, stage: Stage) -> None:
    """By mariabackup, as nodes 2 to 5 of a new cluster; the others serve meanwhile."""
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        *others, node = galera.nodes
        assert the_writer(galera, writer) is not node
        node.stop()
        galera.wait_for(others, len(others))
        shutil.rmtree(node.folder / "data")
        node.log.unlink()
        began = time.monotonic()
        node.start()
        wait_until(node.is_synced, 2 * WAIT_SECONDS)
        assert "mariabackup SST completed on joiner" in node.log.read_text()  # not only what it missed
        report(f"{node.name} given all", running, began, running.recovered(began))
        galera.wait_for(galera.nodes, len(galera.nodes))
        assert is_sound(galera, running)
        assert {text for text in map(complaint, running.since(began)) if text} == set()
    assert is_sound(galera, running)


@pytest.mark.skipif(not can_cut(), reason="cutting a network needs root and iptables")
def test_the_site_of_the_writer_is_cut_off(galera: Galera, writer: Writer, stage: Stage) -> None:
    """From the other sites, and from the service: its nodes must not take a write that the others do not see."""
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        site = the_writer(galera, writer).site
        began = time.monotonic()
        with galera.cut(site):
            seconds = running.recovered(began)
            first = report(f"site {site} cut off", running, began, seconds)
            assert seconds is not None
            assert max(first, seconds) < SILENT_SECONDS
            wait_until(lambda: not any(node.is_synced() for node in galera.site(site)))
        galera.wait_for(galera.nodes, len(galera.nodes))  # without hands
        assert is_sound(galera, running)
        assert {text for text in map(complaint, running.since(began)) if text} == set()
    assert is_sound(galera, running)


def test_two_sites_are_killed_and_the_rest_refuses_until_it_is_told_to_go_on(
    galera: Galera, writer: Writer, stage: Stage
) -> None:
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        rest, gone = galera.site(1), galera.site(2) + galera.site(3)
        galera.kill(gone)
        wait_until(lambda: not any(node.is_synced() for node in rest))
        began = time.monotonic()
        wait_until(lambda: len([one for one in running.since(began) if one.request.kind == "order"]) > 20)
        refused = [one for one in running.since(began) if one.request.kind in ("order", "once", "item", "read")]
        assert set(codes(refused)) == {503}
        assert [complaint(one) for one in refused if complaint(one)] == []
        chosen = max(rest, key=lambda node: node.last_committed)
        began = time.monotonic()
        chosen.bootstrap()
        seconds = running.recovered(began)
        report("two sites killed, and the rest told to go on", running, began, seconds)
        assert seconds is not None
        assert is_sound(galera, running)
        galera.join(gone)
        galera.wait_for(galera.nodes, len(galera.nodes))
        assert is_sound(galera, running)
    assert is_sound(galera, running)


def test_two_nodes_are_killed_as_a_third_one_hangs(galera: Galera, writer: Writer, stage: Stage) -> None:
    """Three see each other again, and do not go on by themselves: they were a minority in between."""
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        first, second, third, *gone = galera.nodes
        rest = [first, second, third]
        third.suspend()
        galera.kill(gone)
        wait_until(lambda: not any(node.is_synced() for node in (first, second)))
        third.resume()
        wait_until(lambda: {node.status("wsrep_cluster_size") for node in rest} == {"3"})
        assert {node.status("wsrep_cluster_status") for node in rest} == {"non-Primary"}
        began = time.monotonic()
        first.bootstrap()
        seconds = running.recovered(began)
        report("two nodes killed as a third one hung, and the rest told to go on", running, began, seconds)
        assert seconds is not None
        galera.join(gone)
        galera.wait_for(galera.nodes, len(galera.nodes))
        assert is_sound(galera, running)
    assert is_sound(galera, running)


def test_a_node_hangs(galera: Galera, writer: Writer, stage: Stage) -> None:
    """The writer, with all that is open to it. It is also who passes on to its site what comes from the others."""
    with history(stage) as running, ExitStack() as stack:
        assert running.recovered(time.monotonic()) is not None
        gone = the_writer(galera, writer)
        client = stack.enter_context(socket.create_connection(("127.0.0.1", writer.port), WAIT_SECONDS))
        assert client.recv(4096)  # the greeting
        began = time.monotonic()
        gone.suspend()
        stack.callback(gone.resume)
        seconds = running.recovered(began)
        first = report(f"{gone.name} hangs", running, began, seconds)
        assert seconds is not None
        assert max(first, seconds) < SILENT_SECONDS
        assert client.recv(4096) == b""  # who waits for it without a limit is told
        now = the_writer(galera, writer)
        assert now is not gone
        gone.resume()
        galera.wait_for(galera.nodes, len(galera.nodes))
        wait_until(lambda: writer.states()[gone.name] == "UP")
        assert the_writer(galera, writer) is now
        assert is_sound(galera, running)
        assert {text for text in map(complaint, running.since(began)) if text} == set()
    assert is_sound(galera, running)


@pytest.mark.skipif(not can_cut(), reason="losing a packet needs root and iptables")
def test_a_lost_packet_moves_no_writer(galera: Galera, writer: Writer) -> None:
    """The first one of a connection, as between cities now and then: the kernel sends it again after a second."""
    at = ("127.0.0.1", writer.port)
    with socket.create_connection(at, WAIT_SECONDS) as open_before:
        assert open_before.recv(4096)  # the greeting
        node = the_writer(galera, writer)
        before = writer.sessions()[node.name]
        cut([("-p", "tcp", "--syn", "-d", node.address, "--dport", str(node.port))])
        try:
            late = socket.create_connection(at, WAIT_SECONDS)
            wait_until(lambda: writer.sessions()[node.name] > before)  # has sent its first packet
        finally:
            heal()
        with late:
            assert late.recv(4096)
        open_before.setblocking(False)
        with pytest.raises(BlockingIOError):
            open_before.recv(4096)  # its end
    assert the_writer(galera, writer) is node


def test_after_a_power_cut_everything_comes_back_by_itself(galera: Galera, writer: Writer, stage: Stage) -> None:
    """Though one node starts much later than the others: none of them gives up."""
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        galera.kill(galera.nodes)
        late, *others = galera.nodes
        for node in others:
            node.start()
        waiting = [node.process for node in others]
        time.sleep(35)  # a node that was in no cluster would have given up after 30 s
        assert all(node.is_waiting() for node in others)
        began = time.monotonic()
        late.start()
        galera.wait_for(galera.nodes, len(galera.nodes))
        assert [node.process for node in others] == waiting  # no hand has started one again
        seconds = running.recovered(began)
        report("all nodes killed, and the last one started", running, began, seconds)
        assert seconds is not None
        assert is_sound(galera, running)
    assert is_sound(galera, running)


def test_after_a_power_cut_some_nodes_are_told_to_go_on_without_the_others(
    galera: Galera, writer: Writer, stage: Stage
) -> None:
    """By the commands of README.md; the writer is one of them, as the others have its last commits only in memory."""
    forced, forgotten = (documented(rf"({command} .*grastate\.dat)") for command in ("sed", "rm"))
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        former = the_writer(galera, writer)
        other = next(node for node in galera.nodes if node.site != former.site)
        rest, lost = [former, other], [node for node in galera.nodes if node not in (former, other)]
        galera.kill(galera.nodes)
        for node in rest:
            node.start()
        wait_until(lambda: all(node.is_waiting() for node in rest))
        galera.kill(rest)
        chosen = max(rest, key=lambda node: int(node.recover().partition(":")[2]))
        chosen.start(new_cluster=True)
        wait_until(lambda: not chosen.running())  # Galera refuses it after a crash
        began = time.monotonic()
        chosen.do(forced)
        chosen.start(new_cluster=True)
        galera.wait_for([chosen], 1)
        galera.join(node for node in rest if node is not chosen)
        seconds = running.recovered(began)
        report("all nodes killed, and two told to go on", running, began, seconds)
        assert seconds is not None
        assert is_sound(galera, running)
        for node in lost:
            node.do(forgotten)
        galera.join(lost)
        galera.wait_for(galera.nodes, len(galera.nodes))
        assert is_sound(galera, running)
    assert is_sound(galera, running)


def test_writers_on_several_nodes_lose_no_update(
    galera: Galera, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Not how it is shipped; but so it is for a moment when two HAProxies do not see the same nodes."""
    before = conflicts(galera)
    with closing(Writer(tmp_path_factory.mktemp("several"), galera, several=True)) as several:
        wait_until(lambda: set(several.states().values()) == {"UP"})
        stage.serve(DATABASE_URL=several.url)
        with history(stage) as running:
            began = time.monotonic()
            wait_until(lambda: conflicts(galera) > before + 10)
            report("writers on all nodes", running, began, running.recovered(time.monotonic()))
            assert {text for text in map(complaint, running.since(0)) if text} == set()
        stage.serve()
    assert is_sound(galera, running)


MIGRATION = """op.add_column("orders", sa.Column("paid_at_{0}", sa.DateTime()))
op.add_column("orders", sa.Column("is_gift_{0}", sa.Boolean(), nullable=False, server_default=sa.false()))
op.create_table("vouchers_{0}", sa.Column("id", sa.Integer(), primary_key=True))
op.create_index("ix_orders_paid_at", "orders", ["remark"], if_not_exists=True)"""
ROWS = """INSERT INTO orders (status, remark, total, version, created_at, updated_at)
SELECT 'completed', CONCAT('old-', seq), 0, 0, NOW(), NOW() FROM seq_1_to_100000"""
STALL_SECONDS = 1


def test_a_migration_blocks_nobody_for_a_second(galera: Galera, writer: Writer, stage: Stage, tmp_path: Path) -> None:
    """Of a large table; its index has been built as README.md says.

    A busy machine holds up whatever runs on it: of three migrations of the same kind one must keep the promise, and all
    builds of the index, one on each node, may hold the writes up by a second more. The nodes refuse here what is more
    than a note in a table (`INSTANT`), so what blocks for long fails on any machine.
    """
    release = Tree(tmp_path / "release")
    revisions = (8, 9, 10)
    for number in revisions:
        release.migrate(MIGRATION.format(number), number)
    galera.nodes[0].execute_all(f"USE {DATABASE}", ROWS)
    with history(stage) as running:
        assert running.recovered(time.monotonic()) is not None
        start = time.monotonic()
        builds = []
        for node in galera.nodes:
            if node.name == writer.writer():
                writer.ask(f"set server database/{node.name} state maint")
                wait_until(lambda moved=node: writer.sessions()[moved.name] == 0 and writer.writer() != moved.name)
            began = time.monotonic()
            node.execute_all(
                "SET SESSION wsrep_OSU_method = 'RSU'",
                f"CREATE INDEX IF NOT EXISTS ix_orders_paid_at ON {DATABASE}.orders (remark)",
            )
            builds.append(stall(running, began))
            node.execute("SET GLOBAL alter_algorithm = 'INSTANT'")
            writer.ask(f"set server database/{node.name} state ready")
        galera.wait_for(galera.nodes, len(galera.nodes))
        env = {**os.environ, "ENV_FILE": os.devnull, "DATABASE_URL": writer.url}
        migrations = []
        for number in revisions:
            began = time.monotonic()
            command = [sys.executable, "-m", "alembic", "upgrade", f"{number:04}"]
            subprocess.run(command, cwd=release.folder, env=env, check=True)
            migrations.append(stall(running, began))
        print("\nno write for", *(f"{seconds:.2f}" for seconds in builds), "s with RSU,", end=" ")
        print(*(f"{seconds:.2f}" for seconds in migrations), "s with a migration")
        assert min(migrations) < STALL_SECONDS
        assert max(builds) < STALL_SECONDS + 1
        assert {text for text in map(complaint, running.since(start)) if text} == set()
    assert is_sound(galera, running)


def stall(running: History, began: float) -> float:
    """Return the seconds of the longest span since then in which no write was acknowledged."""
    writes = (one for one in list(running.outcomes) if one.request.kind in ("order", "once", "item") and is_right(one))
    acknowledged = sorted(ended for one in writes if (ended := one.began + one.seconds) > began)
    return max(after - before for before, after in pairwise([began, *acknowledged, time.monotonic()]))


def conflicts(galera: Galera) -> int:
    """Return how many transactions were refused for another node's."""
    names = ("wsrep_local_cert_failures", "wsrep_local_bf_aborts")
    return sum(int(node.status(name)) for node in galera.nodes for name in names)


def test_the_checker_sees_what_a_cluster_that_does_not_flush_loses(
    galera: Galera, writer: Writer, stage: Stage
) -> None:
    """As Galera's manuals advise; last, as the cluster is of no use after it."""
    with history(stage, order=3, once=2) as running:
        assert running.recovered(time.monotonic()) is not None
        for node in galera.nodes:
            node.execute("SET GLOBAL innodb_flush_log_at_timeout = 100")
            node.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
        before = len(running.acknowledged)
        wait_until(lambda: len(running.acknowledged) > before + 30)
        galera.kill(galera.nodes)
        acknowledged = len(running.acknowledged)
        galera.restart()
        wait_until(lambda: "UP" in writer.states().values())
        seen = running.verdict()
    print(f"\nwithout a flush at each commit: {acknowledged} acknowledged, {seen}")
    assert seen.lost > 0
