"""The faults that take little time, and the checker itself; `make faults` has them all."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.faults import clients
from tests.faults.experiment import Row, experiment
from tests.faults.stage import Stage
from tests.faults.table import FAULTS, SEEDED, Fault


@pytest.fixture(scope="module")
def stage(pytestconfig: pytest.Config) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack, pytestconfig.getoption("database") == "mariadb")


FAST = [
    pytest.param(fault, id=fault.name, marks=[pytest.mark.only_on(fault.only_on)] if fault.only_on else [])
    for fault in FAULTS
    if fault.fast
]


def problems_of(attempt: Callable[[], Row]) -> list[str]:
    """Return the problems of an attempt; of the last of three if the machine was too busy to serve what it should."""
    problems = attempt().problems
    for _ in range(2):
        if any("not concerned" in problem or "beside it" in problem for problem in problems):
            problems = attempt().problems
    return problems


@pytest.mark.parametrize("fault", FAST)
def test_under_a_fault_nothing_is_lost_or_doubled_and_it_recovers_by_itself(stage: Stage, fault: Fault) -> None:
    assert problems_of(lambda: experiment(stage, fault)) == []


def test_clients_that_misbehave_are_refused_and_harm_nobody(stage: Stage) -> None:
    failed = {row.fault for row in clients.run(stage) if row.problems}
    again = [client for client in clients.CLIENTS if f"client: {client.name}" in failed]
    assert {client.name: problems_of(lambda client=client: clients.run(stage, [client])[0]) for client in again} == {
        client.name: [] for client in again
    }


@pytest.mark.database
def test_the_checker_sees_orders_that_are_lost_or_doubled(stage: Stage) -> None:
    row = experiment(stage, SEEDED)
    assert row.lost > 0
    assert row.doubled > 0
    assert len([problem for problem in row.problems if "not concerned" not in problem]) == 2


@contextmanager
def _without_effect(stage: Stage) -> Iterator[Callable[[], bool]]:
    yield lambda: False


def test_the_checker_sees_a_fault_that_does_not_happen(stage: Stage) -> None:
    assert experiment(stage, Fault("none", _without_effect, seconds=0)).problems == ["vacuous: it did not happen"]
