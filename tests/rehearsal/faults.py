"""The faults: how each is caused and what it may cost.

Each is a context manager that begins it and ends it, and yields the proof that it happened: a function that is called
before the end.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.deploy.dns_servers import DnsServer, query
from tests.deploy.galera_nodes import Node
from tests.deploy.redis_sentinels import RedisProcess
from tests.harness import ROOT, WAIT_SECONDS, wait_until
from tests.rehearsal.stage import Site, Stage, Startable
from tests.rehearsal.users import PHONE_PATH, SLOW_SECONDS, all_the_time
from tests.rehearsal.verdict import KINDS, RESENT, Goal

Proof = Callable[[], object]
Cause = Callable[[Stage], AbstractContextManager[Proof]]


@dataclass(frozen=True)
class Fault:
    """A fault.

    :param seconds: how long it lasts.
    :param quick: whether the short form has it.
    """

    name: str
    cause: Cause
    goal: Goal
    seconds: float = 0
    quick: bool = False


@contextmanager
def nothing(stage: Stage) -> Iterator[Proof]:
    yield lambda: True


def all_killed(choose: Callable[[Stage], Sequence[Any]], down: Callable[[Any], bool]) -> Cause:
    """Some servers die, and are started again at the end.

    :param down: whether one of them is.
    """

    @contextmanager
    def cause(stage: Stage) -> Iterator[Proof]:
        servers: Sequence[Startable] = choose(stage)
        for server in servers:
            server.kill()
        try:
            yield lambda: all(down(server) for server in servers)
        finally:
            for server in servers:
                server.start()

    return cause


# Instances


@contextmanager
def instance_frozen(stage: Stage) -> Iterator[Proof]:
    instance = stage.instances[0]
    instance.suspend()
    try:
        yield lambda: not instance.serving()
    finally:
        instance.resume()


@contextmanager
def patched_in_turn(stage: Stage) -> Iterator[Proof]:
    released = {}
    for instance in stage.instances:
        released[instance.name] = instance.release()
        ended = instance.patch(released[instance.name], watch=1)
        assert ended["end"] == "done", ended
    yield lambda: {instance.name: instance.current() for instance in stage.instances} == released


@contextmanager
def one_of_each_site_stopped(stage: Stage) -> Iterator[Proof]:
    """They stop by SIGTERM; meanwhile each has some of the requests that take long and are not sent again."""
    chosen = [site.instances[0] for site in stage.sites]
    stopped = [instance.process.popen for instance in chosen]
    stage.simulator.fault("slow", 1000, PHONE_PATH, seconds=SLOW_SECONDS)
    try:
        with all_the_time(stage.users_of_sites) as statuses:
            wait_until(lambda: all(statuses))
            for process in stopped:
                process.terminate()
            codes = [process.wait(WAIT_SECONDS) for process in stopped]
    finally:
        stage.simulator.fault("slow", 1, PHONE_PATH, seconds=0)
        for instance, process in zip(chosen, stopped, strict=True):
            if process.poll() is not None:
                instance.start()
    failed = [status for of_one in statuses for status in of_one if status != 200]
    assert not failed, f"phone numbers: {Counter(failed)}"
    yield lambda: codes == [0] * len(codes)


# The way in


@contextmanager
def proxies_reloaded(stage: Stage) -> Iterator[Proof]:
    before = {process for proxy in stage.proxies for process in proxy.family()}
    for proxy in stage.proxies:
        proxy.reload()
    yield lambda: all({*proxy.family()} - before for proxy in stage.proxies)


@contextmanager
def proxy_killed(stage: Stage) -> Iterator[Proof]:
    """The HAProxy that has the address of its site dies; the other one must take it."""
    site = stage.sites[0]
    before = stage.holder(site)
    assert before is not None
    proxy = site.proxies[before]
    proxy.kill()
    try:
        yield lambda: stage.holder(site) == 1 - before
    finally:
        proxy.start()


@contextmanager
def cut_off(stage: Stage) -> Iterator[Proof]:
    """Nothing passes any more between the rest of the world and the site that has Redis's primary."""
    site = site_of(stage, stage.redis.primary())
    others = [other for other in stage.sites if other is not site]
    stage.network.cut(site.number)
    try:
        yield lambda: not any(stage.network.reaches(other.machine, f"127.{site.number}.0.1") for other in others)
    finally:
        stage.network.heal(site.number)


def site_of(stage: Stage, server: RedisProcess) -> Site:
    return stage.sites[int(server.address.split(".")[1]) - 1]


# Redis

REJECTIONS = 30
"""Of the access token: for some seconds, and for both primaries."""


def to_primary(begin: Callable[[RedisProcess], object], end: Callable[[RedisProcess], object]) -> Cause:
    """Something is done to Redis's primary, and undone at the end; meanwhile another one must be elected."""

    @contextmanager
    def cause(stage: Stage) -> Iterator[Proof]:
        primary = stage.redis.primary()
        begin(primary)
        try:
            yield lambda: stage.redis.primary() is not primary
        finally:
            end(primary)

    return cause


@contextmanager
def primary_partitioned(stage: Stage) -> Iterator[Proof]:
    """The primary and the sentinel beside it are cut off from the others, but not from the service.

    While there are two primaries, all instances need WeChat's access token, and WeChat rejects the one that it gives.
    """
    primary = stage.redis.primary()
    machine = site_of(stage, primary).machine
    with stage.network.inside(machine):
        stage.redis.cut(primary)
    try:
        wait_until(lambda: stage.redis.primary() is not primary)
        stage.simulator.fault("errcode", REJECTIONS, PHONE_PATH, errcode=40001)
        with all_the_time(stage.users_of_instances) as statuses:
            yield lambda: stage.redis.primary() is not primary
    finally:
        with stage.network.inside(machine):
            stage.redis.heal()
    assert all(200 in of_one for of_one in statuses), f"phone numbers: {statuses}"


# The database


def nodes_killed(choose: Callable[[Stage], Sequence[Node]]) -> Cause:
    """Some nodes die at once, and return one after the other at the end. If few are left, these are told to go on."""

    @contextmanager
    def cause(stage: Stage) -> Iterator[Proof]:
        galera, nodes = stage.galera, choose(stage)
        left = [node for node in galera.nodes if node not in nodes]
        galera.kill(nodes)
        has_quorum = len(left) > len(nodes)
        try:
            yield lambda: all(node.process is None for node in nodes) and has_quorum == any(map(takes_writes, left))
        finally:
            if not has_quorum:
                left[0].bootstrap()
                wait_until(lambda: takes_writes(left[0]))
            galera.join(nodes)

    return cause


def takes_writes(node: Node) -> bool:
    return node.status("wsrep_cluster_status") == "Primary"


def writer(stage: Stage) -> Node:
    """Return the node that all writes go to."""
    name = stage.sites[0].writer.writer()
    return next(node for node in stage.galera.nodes if node.name == name)


def writer_and_other(stage: Stage) -> list[Node]:
    first = writer(stage)
    return [first, next(node for node in stage.galera.nodes if node.site != first.site)]


@contextmanager
def database_refuses(stage: Stage) -> Iterator[Proof]:
    """Nothing listens any more where the instances of a site look for the database, so the site must leave the name."""
    site = stage.sites[2]
    site.writer.kill()
    try:
        yield lambda: all(not in_answers(server, site) for server in stage.name_servers)
    finally:
        site.writer.start()


def in_answers(server: DnsServer, site: Site) -> bool:
    """Whether a name server still answers with a site."""
    addresses = {address for _, address in query(server.address, times=100)}
    assert addresses, "no answer"
    return site.address in addresses


# All of it


@contextmanager
def power_cut(stage: Stage) -> Iterator[Proof]:
    stage.cut_power()
    try:
        yield lambda: not any(instance.serving() for instance in stage.instances)
    finally:
        stage.restore_power()


NONE, SAFE = Goal(never=KINDS), RESENT
FAIL_OVER = Goal(in_flight=("read",), after_retry=SAFE, moved=10)
WRITABLE = Goal(after_retry=SAFE, moved=5)
MOVED = Goal(after_retry=SAFE, moved=30, returning=10)
FAULTS = [
    Fault("none (control)", nothing, NONE, 5, quick=True),
    Fault(
        "an instance is killed",
        all_killed(lambda stage: stage.instances[:1], lambda one: not one.serving()),
        Goal(never=SAFE),
        8,
        quick=True,
    ),
    Fault("an instance is frozen", instance_frozen, Goal(never=SAFE), 20),
    Fault("all instances are patched, one after the other", patched_in_turn, NONE, quick=True),
    Fault("an instance of each site is stopped (SIGTERM), and starts", one_of_each_site_stopped, NONE, quick=True),
    Fault("HAProxy is reloaded", proxies_reloaded, NONE, quick=True),
    Fault("the HAProxy that has the address is killed", proxy_killed, WRITABLE, 8, quick=True),
    Fault(
        "Redis: the primary is killed, and returns",
        to_primary(lambda one: one.kill(), lambda one: one.start()),
        FAIL_OVER,
        10,
    ),
    Fault(
        "Redis: the primary is frozen, and goes on",
        to_primary(lambda one: one.suspend(), lambda one: one.resume()),
        FAIL_OVER,
        10,
    ),
    Fault(
        "Redis: the primary is cut off from the sentinels",
        primary_partitioned,
        FAIL_OVER._replace(forced=2, two_tokens=2),
        10,
        quick=True,
    ),
    Fault("database: the writer is killed", nodes_killed(lambda stage: [writer(stage)]), WRITABLE, 8),
    Fault(
        "database: the writer and one of another site are killed",
        nodes_killed(writer_and_other),
        WRITABLE,
        8,
        quick=True,
    ),
    Fault("database: a site's nodes are killed", nodes_killed(lambda stage: stage.galera.site(1)), WRITABLE, 8),
    Fault(
        "database: two sites' nodes are killed",
        nodes_killed(lambda stage: [*stage.galera.site(1), *stage.galera.site(2)]),
        Goal(refuses=5),
        15,
        quick=True,
    ),
    Fault("a site's database refuses", database_refuses, MOVED, 40),
    Fault("a site's network is cut", cut_off, MOVED, 45),
    Fault(
        "both HAProxies of a site are killed",
        all_killed(lambda stage: stage.sites[1].proxies, lambda one: one.process.poll() is not None),
        MOVED,
        45,
    ),
    Fault(
        "a name server is killed",
        all_killed(lambda stage: stage.name_servers[:1], lambda one: not query(one.address)),
        NONE,
        15,
    ),
    Fault(
        "etcd is killed",
        all_killed(lambda stage: stage.etcds, lambda one: not one.is_healthy()),
        NONE,
        20,
    ),
    Fault("all processes are killed at once (a power cut)", power_cut, Goal(), 2, quick=True),
]


BUG = {
    "from wsgi import app\n": "",
    "next(numbers)": 'int(response.get_json()["data"]["remark"], 16)',
    "number % 5 in (0, 1)": "True",
    "number % 5": "number % 2",
}
"""Turns tests/apps/forgetful.py into the end of a wsgi.py that loses or doubles each order, by its random remark."""


@contextmanager
def bug(stage: Stage) -> Iterator[Proof]:
    """Patch the first site with a release that acknowledges orders, and loses or doubles each."""
    source = (ROOT / "tests" / "apps" / "forgetful.py").read_text()
    for good, worse in BUG.items():
        assert good in source, good
        source = source.replace(good, worse)

    def change(tree: Any) -> None:
        door = tree / "wsgi.py"
        door.write_text(f"{door.read_text()}\n{source}")

    site = stage.sites[0]
    for instance in site.instances:
        ended = instance.patch(instance.release(change))
        assert ended["end"] == "done", ended
    before = site.served()
    wait_until(lambda: site.served() > before + 80)  # a quarter are orders
    yield lambda: True
    for instance in site.instances:
        assert instance.ask("rollback")["end"] == "done"


SEEDED = Fault("a bug that loses and doubles orders", bug, Goal())
