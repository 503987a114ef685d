"""The faults that take little time, and the checker itself; `make faults` has them all."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.faults import clients
from tests.faults.experiment import experiment
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


@pytest.mark.parametrize("fault", FAST)
def test_under_a_fault_nothing_is_lost_or_doubled_and_it_recovers_by_itself(stage: Stage, fault: Fault) -> None:
    assert experiment(stage, fault).problems == []


def test_clients_that_misbehave_are_refused_and_harm_nobody(stage: Stage) -> None:
    rows = clients.run(stage)
    assert {row.fault: row.problems for row in rows if row.problems} == {}


@pytest.mark.database
def test_the_checker_sees_orders_that_are_lost_or_doubled(stage: Stage) -> None:
    row = experiment(stage, SEEDED)
    assert row.lost > 0
    assert row.doubled > 0
    assert len(row.problems) == 2


@contextmanager
def _without_effect(stage: Stage) -> Iterator[Callable[[], bool]]:
    yield lambda: False


def test_the_checker_sees_a_fault_that_does_not_happen(stage: Stage) -> None:
    assert experiment(stage, Fault("none", _without_effect, seconds=0)).problems == ["vacuous: it did not happen"]
