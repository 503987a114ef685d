"""One fault under load: before, during and after it, and a verdict."""

import time

from tests.faults.load import codes, in_background
from tests.rehearsal.faults import Fault
from tests.rehearsal.load import OpenLoad
from tests.rehearsal.stage import Stage
from tests.rehearsal.verdict import STRENGTH_SECONDS, Facts, Row, judge, seconds_with_two

STEADY_SECONDS = 2
"""For how long all must be well before a fault, and is watched after it."""


def rehearse(stage: Stage, fault: Fault, rate: float) -> Row:
    """Cause a fault under load, end it, wait until all is back, and check what was acknowledged."""
    load = f"{rate:g}/s"
    try:
        facts = _under_load(stage, fault, rate)
    except Exception as error:  # noqa: BLE001  the other faults follow
        return Row(fault.name, load, strength=None, problems=[f"{type(error).__name__}: {error}"])
    return judge(fault.name, load, fault.goal, facts)


def _under_load(stage: Stage, fault: Fault, rate: float) -> Facts:
    running = OpenLoad(stage, rate)
    with in_background(running):
        began = time.monotonic()
        if running.recovered(began, STEADY_SECONDS) is None:
            raise AssertionError(f"not well before it: {codes(running.since(began))}")
        began = time.monotonic()
        with fault.cause(stage) as proof:
            time.sleep(fault.seconds)
            happened = proof()
            ended = time.monotonic()
        back, lacking = stage.wait_for_full_strength(STRENGTH_SECONDS)
        time.sleep(STEADY_SECONDS)
    # Each node must have them all.
    counts = [running.count_orders(url) for url in stage.database_urls()]
    lost, doubled = (max(numbers) for numbers in zip(*counts, strict=True))
    forced, uses = stage.simulator.access_tokens()
    return Facts(
        happened,
        began,
        ended,
        running.sent,
        lost + running.missing_sessions,
        doubled,
        back and back - ended,
        lacking,
        running.complaints,
        forced,
        seconds_with_two(uses),
    )
