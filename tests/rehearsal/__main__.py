"""Rehearses all faults and writes the table deploy/rehearsal.md: `make rehearsal`.

Words select faults by a part of their names; then nothing is written. Ends with a status that is not 0 if a goal is
missed, if a fault did not happen, if all is not back in time, or if the checker misses a bug that is there.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from tests.deploy.galera_nodes import COPY
from tests.harness import ROOT
from tests.rehearsal import network
from tests.rehearsal.experiment import rehearse
from tests.rehearsal.faults import FAULTS, SEEDED, Fault
from tests.rehearsal.load import MIX, PATIENCE_SECONDS, PHONES, RETRY_SECONDS
from tests.rehearsal.stage import STEP_SECONDS, Stage
from tests.rehearsal.users import SLOW_SECONDS
from tests.rehearsal.verdict import STRENGTH_SECONDS, Row, goals, table

RATE, SEEDED_RATE = 8, 20
PROGRAMS = ("haproxy", "keepalived", "curl", "mariadbd", *COPY, "iptables", "etcd", "gdnsd", "dig")
TABLE = ROOT / "deploy" / "rehearsal.md"
INTRODUCTION = """# The rehearsal

`make rehearsal` writes this table. On one machine, each site in a network namespace of its own, these run with the
configuration of `deploy/`: {runs}.

{phones} clients, each with a resolver that keeps to the TTL, send {rate:g} requests a second, whatever becomes of those
before: of {mix}, {reads} read the user of a session, {orders} order with an `Idempotency-Key`, {unkeyed} orders without
one, {logins} logs in. They wait {patience} s for a response, and for {retry} s send again what failed: reads, and
orders with their keys.

- Failed are requests whose first response was not the right one; "sent again" counts those that failed in the end.
- Acknowledged are orders and logins. Lost are orders that are not in each node of the database when all is back, and
  logins whose session is gone; doubled are orders that are there twice.
- The seconds until a failure count from the beginning of the fault until that request was sent; those to full strength
  from when its repair began, as by starting what was killed, until every process, check, replica, member and weight is
  as before. For a patch, a reload and the control nothing is to be repaired.
- Two access tokens of WeChat's are in use from the first use of one until the last use of the one before. Where they
  are counted, WeChat rejects the token that it hands out, for some seconds from when there are two primaries.
- An instance that is stopped has writes that take {slow} s, and that nobody sends again: of them none may fail either.
- The last row is a bug of ours that the checker must see.

What differs from production: a site that comes back to the name gets its share in steps of {step} s, not 30; no rate of
a client is limited; releases are given to the supervisor of `deploy/patch` without the checks before that. What is not
rehearsed: the distance between sites, and disks that lose what they have acknowledged, as a killed process leaves the
kernel's cache.

All must be back within {strength} s, and nothing acknowledged may be lost or doubled. The other goals:

"""


def options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of the name of a fault to rehearse; all else")
    parser.add_argument("--quick", action="store_true", help="only what takes some minutes; writes nothing")
    parser.add_argument("--rate", type=float, default=RATE, help=f"requests a second (default: {RATE})")
    parser.add_argument("--workers", type=int, default=2, help="of each instance (default: 2)")
    return parser.parse_args(words)


def main() -> None:
    asked = options(sys.argv[1:])
    if reason := network.why_not(PROGRAMS):
        sys.exit(f"The rehearsal cannot run here: {reason}")
    network.enter(["tests.rehearsal", *sys.argv[1:]])
    chosen = [fault for fault in FAULTS if selected(fault, asked)]
    left_out = [fault.name for fault in FAULTS if fault not in chosen]
    rows: list[Row] = []
    began = time.monotonic()

    def show(row: Row) -> None:
        rows.append(row)
        print(table([row]).splitlines()[-1], f"({time.monotonic() - began:.0f} s)", flush=True)

    with ExitStack() as stack:
        stage = Stage(stack, workers=asked.workers)
        print(f"{stage.describe()} run after {time.monotonic() - began:.0f} s", flush=True)
        for fault in chosen:
            show(rehearse(stage, fault, asked.rate))
        show(seeded(rehearse(stage, SEEDED, SEEDED_RATE)))
        introduction = INTRODUCTION.format(
            runs=stage.describe(),
            phones=PHONES,
            rate=asked.rate,
            mix=len(MIX),
            reads=MIX.count("read"),
            orders=MIX.count("order"),
            unkeyed=MIX.count("unkeyed order"),
            logins=MIX.count("login"),
            patience=PATIENCE_SECONDS,
            slow=SLOW_SECONDS,
            retry=RETRY_SECONDS,
            strength=STRENGTH_SECONDS,
            step=STEP_SECONDS,
        )
    text = f"{introduction}{goals((fault.name, fault.goal) for fault in chosen)}\n{table(rows)}"
    if not left_out:
        TABLE.write_text(text)
    print(f"{len(rows)} faults in {time.monotonic() - began:.0f} s; left out: {', '.join(left_out) or 'none'}")
    if failed := [f"{row.fault}: {'; '.join(row.problems)}" for row in rows if row.problems]:
        sys.exit("\n".join(["", *failed]))


def seeded(row: Row) -> Row:
    """Return the row of a bug that the checker must see: that is its goal."""
    row.fault += " (the checker must see it)"
    row.problems = [] if row.lost and row.doubled else ["the checker does not see it", *row.problems]
    return row


def selected(fault: Fault, asked: argparse.Namespace) -> bool:
    named = not asked.words or any(word in fault.name for word in asked.words)
    return named and (fault.quick or not asked.quick)


if __name__ == "__main__":
    main()
