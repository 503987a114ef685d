"""One fault under load: before, during and after it, and a verdict."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.load import HUNG
from tests.faults.load import CLIENTS, codes, complaint, is_right, load
from tests.faults.stage import Stage
from tests.faults.table import Fault

EXCUSED = 0.02
"""The share of requests that may be refused for now though the fault does not concern them: the machine is busy."""


@dataclass
class Row:
    """What a fault led to.

    :param answers: to the requests sent while it lasted, by business code.
    :param recovery: seconds from its end until the last request that was not right; None if it did not recover.
    :param problems: all that must not be.
    """

    fault: str
    answers: dict[Any, int] = field(default_factory=dict)
    lost: int = 0
    doubled: int = 0
    recovery: float | None = 0
    problems: list[str] = field(default_factory=list)


def experiment(stage: Stage, fault: Fault) -> Row:
    """Cause a fault while the service is under load, end it, and check what was acknowledged."""
    row = Row(fault.name)
    try:
        stage.serve(**fault.start(stage))
        _under_load(stage, fault, row)
    except Exception as error:  # noqa: BLE001  the other faults follow
        row.problems.append(f"{type(error).__name__}: {error}")
    return row


def _under_load(stage: Stage, fault: Fault, row: Row) -> None:
    with load(stage) as running:
        began = time.monotonic()
        if running.recovered(began) is None:
            row.problems.append(f"not well before it: {codes(running.since(began))}")
        began = time.monotonic()
        with fault.cause(stage) as proof:
            time.sleep(fault.seconds)
            if not proof():
                row.problems.append("vacuous: it did not happen")
        healed = time.monotonic()
        row.recovery = running.recovered(healed)
        during = [outcome for outcome in running.since(began) if outcome.began < healed]
        all_outcomes = running.since(began)
    row.answers = codes(during)
    if row.recovery is None:
        row.problems.append("did not recover")
    complaints = Counter(filter(None, map(complaint, all_outcomes)))
    row.problems += [f"{text} ({count} ×)" for text, count in complaints.items()]
    silent = Counter(f"{one.request.kind}: {one.status}" for one in all_outcomes if isinstance(one.status, str))
    row.problems += [f"{text} ({n} ×)" for text, n in silent.items() if not fault.drops or text.endswith(HUNG)]
    for kind in set(CLIENTS) - set(fault.affects):
        of_kind = [outcome for outcome in during if outcome.request.kind == kind]
        refused = [outcome for outcome in of_kind if not is_right(outcome)]
        if len(refused) > 1 + EXCUSED * len(of_kind):
            row.problems.append(f"{kind}: {len(refused)} of {len(of_kind)} refused, though it is not concerned")
    row.lost, row.doubled = running.count_orders()
    row.lost += running.missing_sessions
    row.problems += [f"{count} {what}" for count, what in ((row.lost, "lost"), (row.doubled, "doubled")) if count]
